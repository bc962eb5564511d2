"""The salt of a request's prefix-cache blocks: keys and values are reused under the same steering only.

The other half is `vllm_patches.scheduler`, which limits prefix hits to the rows before the first captured one.
"""

from collections.abc import Sequence

from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.slots import ProgramLease, ProgramLoad
from steer_service.runtime.prepare import PreparedRequest

MAX_FAILED_PROGRAMS = 4096
"""Programs whose failures are remembered. At one more, they are forgotten and all programs begin with new blocks."""


class ProgramEpochs:
    """How often each program has left rows that were not finite, in whichever slots it was.

    The workers count failures for each slot. A program that fails gets a new epoch, and only its own blocks are not
    reused; it keeps its epoch when it leaves its slot and returns to another one.
    """

    def __init__(self, counters: FailureCounters) -> None:
        self._counters = counters
        self._loaded: dict[int, tuple[str, int]] = {}  # slot -> digest of its program, failures of the slot before it
        self._failures: dict[str, int] = {}  # digest -> failures in earlier slots, if there were any
        self._forgotten = 0  # how often `_failures` was cleared

    def record(self, loads: Sequence[ProgramLoad]) -> None:
        """Call it when the workers have processed `loads`: earlier programs of these slots cannot fail any more."""
        for load in loads:
            failures = self._counters.of_slot(load.slot)
            digest, before = self._loaded.pop(load.slot, ("", failures))
            if failures != before:
                self._remember(digest, failures - before)
            if load.digest:
                self._loaded[load.slot] = load.digest, failures

    def of(self, lease: ProgramLease) -> str:
        """The epoch of a leased program: a text that it did not have before its last failure."""
        _, before = self._loaded[lease.slot]
        failures = self._failures.get(lease.digest, 0) + self._counters.of_slot(lease.slot) - before
        return f"{self._forgotten}.{failures}"

    def _remember(self, digest: str, failures: int) -> None:
        if digest not in self._failures and len(self._failures) == MAX_FAILED_PROGRAMS:
            self._failures.clear()
            self._forgotten += 1
        self._failures[digest] = self._failures.get(digest, 0) + failures


def cache_salt(prepared: PreparedRequest, lease: ProgramLease | None, epochs: ProgramEpochs) -> str | None:
    """The salt; None for an unsteered request without a salt of its own.

    The salt has the program's digest, its epoch and a digest of the steered positions of each of its scopes. Blocks
    that a failed program may have left are therefore never reused.
    """
    parts = []
    if lease is not None:
        parts.append(f"steer:{lease.digest}:{prepared.rows.steered_digest}:{epochs.of(lease)}")
    if prepared.request.cache_salt:
        parts.append(f"user:{prepared.request.cache_salt}")
    return "/".join(parts) or None
