"""A dummy forward pass over chosen inputs, in either of vLLM's model runners.

Relies on (vLLM 0.24 to 0.33): `_dummy_run(n, force_attention=True, uniform_decode=..., profile_seq_lens=...)`, which
runs the model on the first n entries of its buffer of token ids (or of embeddings, or of `intermediate_tensors` on a
later pipeline stage), each a request of its own as far as `max_num_seqs` allows, and returns the model's output. The
requests have no context: without `profile_seq_lens` the V1 runner would take each to be as long as all rows. The V2
runner zeroes the token ids first and calls its `prepare_dummy_attn` afterwards; only its `execute_model` returns the
output of an earlier pipeline stage. In newer versions, all rows of a dummy run are padding, which routers of experts
drop on a GPU: a mixture of experts would be tested without its experts. The V1 runner makes the mask in
`_prepare_padding_mask(rows, padded)`; the V2 runner has it in its `input_buffers.is_padding`.
tests/engine/worker/test_self_test.py and test_v2.py notice a change.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from vllm.distributed.parallel_state import get_pp_group

from steer_service.engine.worker.batch_rows import is_v2
from steer_service.engine.worker.dispatch import DummyShape
from steer_service.engine.worker.replaced_method import replaced

INPUTS = 4
"""The number of different inputs."""

PROOF_ROWS = INPUTS + 12
"""Largest number of tested rows of one dummy run. A rank stages as many at least."""

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a buffer and the values for its first rows."""


def run_dummy(runner: Any, inputs_N: npt.NDArray[Any], shape: DummyShape) -> Any:
    """The model's output for inputs with these numbers (below INPUTS), a row for each; padding rows may follow.

    `shape`: as many rows, and how vLLM is to run them.
    """
    chosen = [(buffer, values.to(buffer)[inputs_N]) for buffer, values in _sources(runner)]
    before = [(buffer, buffer[: len(inputs_N)].clone()) for buffer, _ in chosen]
    _fill(chosen)
    try:
        return _run_v2(runner, shape, chosen) if is_v2(runner) else _run(runner, shape)
    finally:
        _fill(before)


def _run(runner: Any, shape: DummyShape) -> Any:
    requests = min(shape.rows, runner.scheduler_config.max_num_seqs)
    with _unpadded(runner, shape.rows):
        output, _ = runner._dummy_run(
            shape.rows,
            force_attention=True,
            uniform_decode=shape.is_decode,
            skip_eplb=True,
            num_active_loras=shape.adapters,
            profile_seq_lens=shape.rows // requests + shape.rows % requests,
        )
    return output


@contextmanager
def _unpadded(runner: Any, count: int) -> Iterator[None]:
    """Within the block, the first rows of the V1 runner's dummy run are no padding."""
    mask_of = getattr(runner, "_prepare_padding_mask", None)
    if mask_of is None:
        yield
        return
    with replaced(runner, "_prepare_padding_mask", lambda _, padded: mask_of(count, padded)):
        yield


def _run_v2(runner: Any, shape: DummyShape, chosen: Rows) -> Any:
    prepare_dummy_attn, execute_model, returned = runner.prepare_dummy_attn, runner.execute_model, []

    def prepared(*args: Any, **kwargs: Any) -> Any:
        _fill(chosen)
        padding_T = getattr(runner.input_buffers, "is_padding", None)
        if padding_T is not None:
            padding_T[: shape.rows] = False
        return prepare_dummy_attn(*args, **kwargs)

    def executed(*args: Any, **kwargs: Any) -> Any:
        returned.append(execute_model(*args, **kwargs))
        return returned[-1]

    with replaced(runner, "prepare_dummy_attn", prepared), replaced(runner, "execute_model", executed):
        output = _run(runner, shape)
    return returned[-1] if output is None else output


def _fill(rows: Rows) -> None:
    for buffer, first in rows:
        buffer[: len(first)] = first


def _sources(runner: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each buffer from which a dummy run may read its input, with INPUTS rows for it, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    if not get_pp_group().is_first_rank:
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        for tensor in runner.intermediate_tensors.tensors.values():
            yield tensor, torch.randn(INPUTS, tensor.shape[-1], generator=generator)
        return
    token_ids_T, embeddings_TD = _buffers_of_v2(runner) if is_v2(runner) else _buffers_of_v1(runner)
    yield token_ids_T, torch.linspace(0, runner.model_config.get_vocab_size() - 1, INPUTS).long()
    if embeddings_TD is not None:
        yield embeddings_TD, torch.randn(INPUTS, embeddings_TD.shape[-1], generator=generator)


def _buffers_of_v1(runner: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The V1 runner's buffers of token ids and, for multimodal models, of embeddings."""
    embeddings = getattr(runner, "inputs_embeds", None)
    return runner.input_ids.gpu, None if embeddings is None else embeddings.gpu


def _buffers_of_v2(runner: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The V2 runner's buffers of token ids and of embeddings; the latter are in its encoder runner or model state."""
    holders = (getattr(runner.model_state, "encoder_runner", None), runner.model_state)
    embeddings = (getattr(holder, "inputs_embeds", None) for holder in holders)
    return runner.input_buffers.input_ids, next((buffer for buffer in embeddings if buffer is not None), None)
