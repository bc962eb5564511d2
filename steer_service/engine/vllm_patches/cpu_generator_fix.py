"""Keeps vLLM alive on a CPU for seeded requests whose prompt takes several steps.

A step that ends within a prompt samples a token and discards it. vLLM then resets the request's generator with
`Generator.set_offset`, which CPU generators do not support ("CPU Generator does not use offset"), and dies. If these
generators are hidden while the step samples, their state does not change and they need no reset.

Relies on (vLLM 0.24 to 0.33): the V1 runner's `sample_tokens`, `discard_request_mask` and `input_batch.generators`; the
V2 runner has no generators.
tests/engine/test_engine_arguments_rows.py notices a change: its traffic has such requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def without_discarded_generators(runner: Any) -> Iterator[None]:
    """Within the block, hides the generators of requests whose token will be discarded from the runner."""
    batch = getattr(runner, "input_batch", None)  # of the V1 runner
    if batch is None or not batch.generators:
        yield
        return
    discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
    hidden = {index: batch.generators.pop(index) for index in discarded if index in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(hidden)
