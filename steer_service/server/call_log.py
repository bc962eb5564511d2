"""The log line of each call that has ended."""

import logging
import math
import time

import grpc

from steer_service.core.log_lines import Field, log_event
from steer_service.server.call_record import CallRecord

logger = logging.getLogger(__name__)

QUIET = ("grpc.", "steer.v1.InfoService/")
"""Methods that begin so are logged at the level `debug`: health checks, reflection, facts about the server."""

REFUSALS_PER_S = 10
"""Lines of calls that were refused, at most: anyone can cause them, and they cost no work."""


ALWAYS_LOGGED = (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class RefusalLimit:
    """Lets REFUSALS_PER_S lines of each second through, and counts the others."""

    now = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._until = -math.inf
        self._left = 0
        self._unlogged = 0

    def take(self) -> int | None:
        """None if a line may not be logged now; else how many were not since the last one."""
        now = self.now()
        if now >= self._until:
            self._until, self._left = now + 1.0, REFUSALS_PER_S
        if not self._left:
            self._unlogged += 1
            return None
        self._left -= 1
        unlogged, self._unlogged = self._unlogged, 0
        return unlogged


_limit = RefusalLimit()


def log_call(call: CallRecord) -> None:
    """Logs a call that has ended, in one line."""
    level = logging.DEBUG if call.method.startswith(QUIET) else logging.INFO
    if not logger.isEnabledFor(level):
        return
    unlogged = None
    if _is_refusal(call):
        unlogged = _limit.take()
        if unlogged is None:
            return
    fields: dict[str, Field] = {
        "method": call.method,
        "code": call.code.name,
        "reason": call.reason or None,
        "duration_s": round(time.monotonic() - call.arrived_at, 6),
        "client": call.client or None,
        "x_request_id": call.x_request_id,
        "trace_id": call.span.trace_id if call.span is not None else None,
        **_of_generation(call),
        "refusals_not_logged": unlogged or None,
    }
    log_event(logger, level, "call", "", fields)


def _is_refusal(call: CallRecord) -> bool:
    """True if it ended with an error before it did anything; failures of the server itself are always logged."""
    has_begun = call.is_open or (call.generation is not None and call.generation.request is not None)
    return not has_begun and call.code not in ALWAYS_LOGGED


def _of_generation(call: CallRecord) -> dict[str, Field]:
    done = call.generation
    if done is None:
        return {}
    if done.request is None:
        return {"queue_wait_s": _seconds(done.queue_wait_s)}
    return {
        "request_id": done.request.request_id,
        "model": done.model or None,
        "prompt_tokens": done.prompt_tokens,
        "generated_tokens": done.generated_tokens,
        "steered_rows": done.steered_rows,
        "captured_bytes": done.captured_bytes,
        "queue_wait_s": _seconds(done.queue_wait_s),
        "first_token_s": _seconds(done.first_token_s),
    }


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
