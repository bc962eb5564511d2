"""Programs in the bank of a worker for the time of a proof, and the requests of the proof's plans."""

from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from steer_service.core.specs import SteeringSpec
from steer_service.engine.slots import ProgramLoad
from steer_service.engine.worker.hooks import HookContext, Hooks
from steer_service.ops.program import compile_program, program_to_bytes

Addresses = npt.NDArray[np.int64]
"""Per layer: where the first row that is captured goes, 0 for nowhere."""


class ProofPrograms:
    """Loads programs; when the block ends, the bank is as empty as it was."""

    def __init__(self, context: HookContext, hooks: Hooks) -> None:
        self._bank = context.bank
        self._hooks = hooks
        self._used: set[int] = set()

    def load(self, slot: int, spec: SteeringSpec) -> None:
        """Puts the program of `spec` into a slot, in place of what was there."""
        program = compile_program(spec)
        self._used.add(slot)
        self._change(ProgramLoad(slot=slot, digest=program.digest, data=program_to_bytes(program)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._used:
            self._change(ProgramLoad(slot=slot, digest="", data=b""))

    def _change(self, load: ProgramLoad) -> None:
        bank = self._bank
        for rows_K, count in zip(bank.op_rows_LSK[:, load.slot], bank.op_counts_LS[:, load.slot], strict=True):
            bank.directions_WD[rows_K[:count]] = 0.0
        bank.load(load)
        self._hooks.sync_slot(load.slot)
