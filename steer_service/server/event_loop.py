"""The event loop that the server runs in."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import uvloop
except ImportError:  # part of the extra `server`; not available on every platform
    uvloop = None  # type: ignore[assignment]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new uvloop event loop, which needs about a tenth less time per token; asyncio's if uvloop is not installed."""
    return asyncio.new_event_loop() if uvloop is None else uvloop.new_event_loop()


THRESHOLDS = (20_000, 20, 50)
"""New objects before a collection of the youngest, and how many of these come before one of the older ones."""


@contextmanager
def kept_heap() -> Iterator[None]:
    """Collects garbage, and keeps what is left from later collections, which stop the event loop, until the block ends.

    Within the block there are also fewer collections: at thousands of tokens per second Python's own thresholds cost a
    tenth of the processor time, and nearly nothing here is in cycles.

    Begin it once everything is imported, which stays anyway: a full collection looks at every object of torch and vLLM
    otherwise. Do not begin it once an engine runs: what an engine leaves behind in cycles would never be freed. After
    the block the interpreter can free everything; bindings of libraries report what it cannot.
    """
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
