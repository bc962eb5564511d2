"""Bounds the ring through which a worker sends its results, which has 240 MiB in vLLM.

Relies on (vLLM 0.24 to 0.33): `WorkerProc._init_message_queues`, which makes a MessageQueue without a size after
`Worker.init_device`; larger messages, which go through a socket. tests/engine/vllm_patches/test_response_ring.py
notices a change.
"""

import os
from typing import Any

from vllm.v1.executor import multiproc_executor

from steer_service.shm.message_rings import VARIABLE, WORKER_MIB


def bound_response_ring() -> None:
    """In a worker: makes its ring no larger than VARIABLE says, if that is set, for messages of at most as many MiB."""
    given = os.environ.get(VARIABLE, "")
    if not given.isdecimal() or not 0 < int(given) < WORKER_MIB:
        return
    largest_bytes = int(given) << 20

    class BoundedQueue(multiproc_executor.MessageQueue):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.setdefault("max_chunk_bytes", largest_bytes)
            super().__init__(*args, **kwargs)

    multiproc_executor.MessageQueue = BoundedQueue  # type: ignore[misc]
