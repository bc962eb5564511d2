"""Which rows of a step belong to which request, read from vLLM's own batch.

V1 runner (vLLM 0.24 to 0.33): `GPUModelRunner._prepare_inputs(scheduler_output, num_scheduled_tokens)` is called once
per step after the persistent batch took its final order; then `input_batch.req_ids` is that order,
`num_scheduled_tokens[i]` the row count and `input_batch.num_computed_tokens_cpu[i]` the first position of request i.
tests/engine/test_seams.py notices a change.
"""

from collections.abc import Callable, Sequence
from typing import Any

from steer_service.core.errors import Unsupported
from steer_service.ops.plan import RequestRows

RowsListener = Callable[[Sequence[RequestRows]], None]


def watch_rows(runner: Any, listener: RowsListener) -> None:
    """Calls `listener` with the rows of every step, in batch order, just before its forward pass.

    Raises Unsupported where the runner has no seam that is known here.
    """
    if not hasattr(runner, "_prepare_inputs") or not hasattr(runner, "input_batch"):
        raise Unsupported(
            f"{type(runner).__name__} has no _prepare_inputs and input_batch: only vLLM's V1 model runner is served",
            reason="UNKNOWN_RUNNER",
        )
    prepare_inputs = runner._prepare_inputs

    def watched(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        listener(rows_of_v1(runner.input_batch, num_scheduled_tokens))
        return prepared

    runner._prepare_inputs = watched  # on the instance: other engines in this process are untouched


def rows_of_v1(input_batch: Any, num_scheduled_tokens: Sequence[int]) -> list[RequestRows]:
    """The rows of the V1 runner's batch, in batch order."""
    rows, first_row = [], 0
    for index, request_id in enumerate(input_batch.req_ids):
        count = int(num_scheduled_tokens[index])
        position = int(input_batch.num_computed_tokens_cpu[index])
        rows.append(RequestRows(request_id, first_row, count, position))
        first_row += count
    return rows
