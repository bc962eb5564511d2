"""The parts: their commands, time limits and readers, on a GPU and in a rehearsal on a CPU."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from bench.on_gpu.part_results import Reading
from bench.on_gpu.readings import MODES, read_conformance, read_kernel, read_selftest, read_throughput


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part."""

    title: str
    command: tuple[str, ...]
    """What is run in a process of its own; empty if it cannot be run on this device."""
    limit_s: float
    """Time after which it is ended."""
    read: Callable[[str], Reading]
    """Reads its log; raises Unreadable if it says nothing."""


def parts_for(device: str) -> dict[int, Part]:
    """Number -> part, in the order in which they run; `device` is cuda or cpu.

    The limits for a GPU and the time to end processes at them, twice GRACE_S for each part, are 13 minutes together.
    """
    on_gpu = device == "cuda"
    dtypes = "bfloat16,float32" if on_gpu else "float32"  # bfloat16 first: it is what is served
    load = ("--compiled", "--tokens", "128", "--rounds", "3", "--minutes", "2")
    small_load = ("--dtype", "float32", "--tokens", "8", "--rounds", "1")
    return {
        1: Part(
            title="The device: `steer selftest`",
            command=_python("steer_service.cli", "selftest", "--device", device),
            limit_s=60 if on_gpu else 120,
            read=read_selftest,
        ),
        2: Part(
            title="The kernel beside a copy: `bench.kernel_gpu`",
            command=_python("bench.kernel_gpu") if on_gpu else (),
            limit_s=80,
            read=read_kernel,
        ),
        3: Part(
            title="Real vLLM: the proof at start, and captures compared with float64",
            command=_python("bench.on_gpu.conformance", "--device", device, "--dtypes", dtypes),
            limit_s=220 if on_gpu else 300,
            read=read_conformance,
        ),
        4: Part(
            title="Throughput beside stock vLLM: `bench`",
            command=_python("bench", "--only", ",".join(MODES), *(load if on_gpu else small_load)),
            limit_s=340 if on_gpu else 300,
            read=read_throughput,
        ),
    }


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)
