"""Seeded requests whose prompt takes several steps, which kill stock vLLM on a CPU.

A step that ends within a prompt samples a token all the same and throws it away; vLLM then winds the request's
generator back with `Generator.set_offset`, which CPU generators do not have ("CPU Generator does not use offset").
Hiding those generators while the step samples leaves them where they were, which is what winding back is for.

Relies on (vLLM 0.24 to 0.33): the V1 runner's `sample_tokens`, `discard_request_mask` and `input_batch.generators`; the
V2 runner has no generators.
tests/engine/test_regimes_rows.py notices a change: its traffic has such requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def without_discarded_generators(runner: Any) -> Iterator[None]:
    """Within the block the runner does not see the generators of requests whose token will be thrown away."""
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
