"""How much of its limits a backend uses now, for operators."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class BankUsage:
    """The bank of steering programs, on each worker alike."""

    slots: int
    """Distinct programs that have room."""
    slots_used: int
    """Programs that running requests use."""
    slots_idle: int
    """Programs that are loaded and that no request uses; one is replaced if another program needs its slot."""
    operations: int
    """Operations that have room, of all programs together."""
    operations_used: int
    """Operations of the programs in use."""
    operations_idle: int
    """Operations of the idle programs."""
    waiting_requests: int
    """Requests that wait for room in the bank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUsage:
    """Shared memory of one budget."""

    used_bytes: int
    """Bytes in use."""
    limit_bytes: int
    """Bytes that may be in use at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUsage:
    """What a backend uses of everything that it limits."""

    bank: BankUsage
    """Its bank."""
    memory: Mapping[str, MemoryUsage] = field(default_factory=dict)
    """Its budgets of shared memory by name: `captures`, and `marks` of rows that were steered and not captured."""
    segments: int = 0
    """Segments of captures."""
