"""Faults that tests make in a worker: its code raises, or its bank is not what the API server process thinks it is.

Every worker calls `install` when it makes the model (see model.py). A fault is armed by writing it to the file that
the variable names, at any time.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

VARIABLE = "TEST_WORKER_FAULT"
"""Names a file with the number of a worker and one of KINDS."""

KINDS = ("plan", "layer", "end", "bank", "kernel", "stream")
"""Before the forward pass, in a layer's hook, after the forward pass, and a bank without its programs. In the proof at
start: a kernel that is found wrong, and streams that are not those of other ranks."""


def install() -> None:
    """Makes the workers of this process have the fault that is in the file, as soon as it is there."""
    if VARIABLE not in os.environ:
        return
    from steer_service.engine.worker import model_proof, self_test, worker_state
    from steer_service.engine.worker.bank import ProgramBank
    from steer_service.engine.worker.hooks_cpu import CpuForward
    from steer_service.engine.worker.kernel_proof import KernelFault, KernelProof

    numbers: list[int] = []  # of the worker in this process

    def made(self: Any, worker: Any, make_hooks: Any, make: Callable[..., None] = worker_state.WorkerState.__init__):
        make(self, worker, make_hooks)
        numbers[:] = [self.facts.number]

    def failing(kind: str, owner: type, name: str) -> None:
        method = getattr(owner, name)

        @wraps(method)
        def failing_method(*args: Any, **kwargs: Any) -> Any:
            if is_armed(numbers, kind):
                raise ZeroDivisionError(f"made by a test: {kind}")
            return method(*args, **kwargs)

        setattr(owner, name, failing_method)

    worker_state.WorkerState.__init__ = made  # type: ignore[method-assign]
    failing("plan", worker_state.WorkerState, "plan_step")
    failing("layer", CpuForward, "visit")
    failing("end", CpuForward, "end")
    prove_kernel, hash_of = self_test.prove_kernel, model_proof.hash_of

    def proven(*args: Any) -> KernelProof:
        if is_armed(numbers, "kernel"):
            raise KernelFault("made by a test: kernel")
        return prove_kernel(*args)

    self_test.prove_kernel = proven
    model_proof.hash_of = lambda stream: hash_of(stream) + "x" * is_armed(numbers, "stream")
    holds = ProgramBank.holds
    ProgramBank.holds = lambda *args: not is_armed(numbers, "bank") and holds(*args)  # type: ignore[method-assign]


def is_armed(numbers: list[int], kind: str) -> bool:
    """True if the file names this worker and this kind of fault."""
    file = Path(os.environ[VARIABLE])
    return file.exists() and file.read_text().split() == [*map(str, numbers), kind]
