"""The salt of a request's prefix-cache blocks: keys and values are reused under the same steering only.

The other half is `vllm_patches.scheduler`, which limits prefix hits to the rows before the first captured one.
"""

from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.slots import ProgramLease
from steer_service.runtime.prepare import PreparedRequest


def cache_salt(prepared: PreparedRequest, lease: ProgramLease | None, counters: FailureCounters) -> str | None:
    """The salt; None for an unsteered request without a salt of its own.

    The salt has the program's digest, the steered positions and the number of failures so far. Blocks that a failed
    program may have left are therefore never reused.
    """
    parts = []
    if lease is not None:
        where = ",".join(f"{first}-{end}" for first, end in prepared.rows.steered)
        parts.append(f"steer:{lease.digest}:{where}:{counters.total()}")
    if prepared.request.cache_salt:
        parts.append(f"user:{prepared.request.cache_salt}")
    return "/".join(parts) or None
