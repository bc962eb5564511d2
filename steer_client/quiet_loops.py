"""Keeps gRPC quiet in processes with several event loops.

All loops wait for one socket of gRPC. A loop that wakes too late, or that gets the end of a call of a closed loop, logs
an error. Neither harms anything.
"""

import logging


class _NotHarmless(logging.Filter):
    """Drops asyncio's report of a loop that found nothing in gRPC's socket, or the event of a closed loop."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        is_harmless = isinstance(error, BlockingIOError) or str(error) == "Event loop is closed"
        return not (is_harmless and "PollerCompletionQueue._handle_events" in record.getMessage())


logging.getLogger("asyncio").addFilter(_NotHarmless())
