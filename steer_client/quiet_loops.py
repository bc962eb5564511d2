"""Keeps gRPC quiet in processes with several event loops.

All loops wait for one socket of gRPC. Older versions of grpcio log an error for each loop that wakes too late, which
harms nothing.
"""

import logging


class _NotTooLate(logging.Filter):
    """Drops asyncio's report of a loop that found nothing in gRPC's socket."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (
            isinstance(error, BlockingIOError) and "PollerCompletionQueue._handle_events" in record.getMessage()
        )


logging.getLogger("asyncio").addFilter(_NotTooLate())
