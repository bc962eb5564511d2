"""Which rows of a step belong to which request, read from vLLM's own batch.

V1 runner (vLLM 0.24 to 0.33): `GPUModelRunner._prepare_inputs(scheduler_output, num_scheduled_tokens)` is called once
per step after the persistent batch has its final order; then `input_batch.req_ids` is that order,
`num_scheduled_tokens[i]` the row count and `input_batch.num_computed_tokens_cpu[i]` the first position of request i.

V2 runner (`v1/worker/gpu/model_runner.py`, 0.24 to 0.33): `prepare_inputs(scheduler_output, ...)`, whose other
arguments differ between versions, is called once per real step and returns the step's `InputBatch`: `req_ids` in batch
order, request i in rows `query_start_loc_np[i]` to `query_start_loc_np[i + 1]` from position
`num_computed_tokens_np[i]`. Requests beyond `req_ids` are padding. Dummy batches are made elsewhere
(`InputBatch.make_dummy`).

Both runners' positions are those of the schedule. If draft tokens are verified while the next step is already being
scheduled, these positions are an upper bound, and only the device has the true ones. engine/refusals.py therefore
refuses speculative decoding.
tests/engine/test_seams.py notices a change.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.ops.plan import RequestRows

RowsListener = Callable[[Sequence[RequestRows]], None]


def watch_rows(runner: Any, listener: RowsListener) -> None:
    """Calls `listener` with the rows of every step, in batch order, just before its forward pass.

    Raises Unsupported for an unknown runner.
    """
    if hasattr(runner, "_prepare_inputs") and hasattr(runner, "input_batch"):
        _watch_v1(runner, listener)
    elif is_v2(runner):
        _watch_v2(runner, listener)
    else:
        raise Unsupported(
            f"{type(runner).__name__} has neither _prepare_inputs and input_batch (vLLM's V1 model runner) nor "
            "prepare_inputs and req_states (its V2 one), so the rows of a request are not known",
            reason="UNKNOWN_RUNNER",
        )


def is_v2(runner: Any) -> bool:
    """True for vLLM's V2 model runner."""
    return hasattr(runner, "prepare_inputs") and hasattr(runner, "req_states")


def _watch_v1(runner: Any, listener: RowsListener) -> None:
    prepare_inputs = runner._prepare_inputs

    def watched(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        listener(rows_of_v1(runner.input_batch, num_scheduled_tokens))
        return prepared

    runner._prepare_inputs = watched  # on the instance: other engines in this process are unchanged


def _watch_v2(runner: Any, listener: RowsListener) -> None:
    prepare_inputs = runner.prepare_inputs

    def watched(*args: Any, **kwargs: Any) -> Any:
        if getattr(runner, "pcp_manager", None) is not None:  # made after the model is loaded in 0.32, before in 0.33
            raise Unsupported("prefill context parallelism splits a request's rows over ranks", reason="UNKNOWN_RUNNER")
        batch = prepare_inputs(*args, **kwargs)
        listener(rows_of_v2(batch))
        return batch

    runner.prepare_inputs = watched  # on the instance: other engines in this process are unchanged


def rows_of_v1(input_batch: Any, num_scheduled_tokens: np.ndarray) -> list[RequestRows]:
    """The rows of the V1 runner's batch, in batch order."""
    request_ids = input_batch.req_ids
    positions = input_batch.num_computed_tokens_cpu[: len(request_ids)]  # the array has room for more requests
    return _consecutive(request_ids, num_scheduled_tokens.tolist(), positions.tolist())


def rows_of_v2(batch: Any) -> list[RequestRows]:
    """The rows of the V2 runner's batch, in batch order.

    Raises EngineFailed for a batch that the device may lay out differently, as in adaptive verification.
    """
    starts = batch.query_start_loc_np[: len(batch.req_ids) + 1]  # the array continues with padded requests
    counts = np.diff(starts)
    if starts[0] != 0 or not np.array_equal(counts, batch.num_scheduled_tokens[: len(counts)]):
        raise EngineFailed(
            "the step's rows are not those of its schedule: the rows of a request are known on the device only",
            reason="ROWS_UNKNOWN",
        )
    return _consecutive(batch.req_ids, counts.tolist(), batch.num_computed_tokens_np[: len(counts)].tolist())


def _consecutive(request_ids: Iterable[str], counts: Iterable[int], positions: Iterable[int]) -> list[RequestRows]:
    """Rows that follow each other without gaps, in the order given."""
    rows, first_row = [], 0
    for request_id, count, position in zip(request_ids, counts, positions, strict=True):
        rows.append(RequestRows(request_id, first_row, count, position))
        first_row += count
    return rows
