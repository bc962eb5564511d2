"""Zeroes the keys and values of bad rows, before other requests get their blocks.

Attention masks positions beyond a sequence, but 0 * NaN is NaN: one NaN in a recycled block spoils another request's
output. vLLM's open pull request 50283 describes it on GPUs; unmodified vLLM on a CPU does the same.

Relies on (vLLM 0.24 to 0.33): the V1 runner's `requests[id].block_ids`, per KV-cache group the block numbers of the
request in order; the V2 runner's `block_tables`, which have them on the device in row `req_states.req_id_to_index[id]`,
`num_blocks` of them; in both `kv_cache_config` with the groups' layers and block sizes, and
`static_forward_context[layer].kv_cache`, with blocks in dimension 0. tests/engine/test_seams.py notices a change.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from steer_service.core.errors import Unsupported
from steer_service.engine.worker.batch_rows import is_v2
from steer_service.ops.plan import RequestRows


class KVBlockZeroer:
    """Finds and zeroes the keys and values of a runner's requests."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def check(self) -> None:
        """Raises Unsupported if blocks cannot be told apart in the cache of one of the layers, which is allocated."""
        block_count = self._runner.kv_cache_config.num_blocks
        for group in self._runner.kv_cache_config.kv_cache_groups:
            for name, cache in self._named_caches(group):
                if cache.shape[0] % block_count:
                    raise Unsupported(
                        f"the keys and values of {name} are {list(cache.shape)}, which {block_count} blocks do not "
                        "divide: those of a request that fails could not be zeroed before others get its memory; "
                        "another attention backend may have another layout",
                        reason="KV_CACHE_LAYOUT",
                    )

    def zero(self, rows: Iterable[RequestRows]) -> None:
        """Zeroes all blocks that hold any of these rows, in every layer. The runner must still have the request."""
        for part in rows:
            block_ids = block_ids_of(self._runner, part.request_id)
            for group, ids in zip(self._runner.kv_cache_config.kv_cache_groups, block_ids, strict=True):
                self._zero_blocks(group, _blocks_of(part, ids, group.kv_cache_spec.block_size))

    def _zero_blocks(self, group: Any, blocks: list[int]) -> None:
        for cache in self._caches(group):
            for block in blocks:
                cache[block].zero_()

    def _caches(self, group: Any) -> Iterator[torch.Tensor]:
        """The cache of each of the group's layers, one entry per block in dimension 0."""
        block_count = self._runner.kv_cache_config.num_blocks
        for _, cache in self._named_caches(group):
            yield cache.unflatten(0, (block_count, -1))  # kernels may split a block into several

    def _named_caches(self, group: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The name of each of the group's layers, with each tensor of its cache."""
        context = self._runner.vllm_config.compilation_config.static_forward_context
        for name in group.layer_names:
            caches = context[name].kv_cache
            for cache in caches if isinstance(caches, (list, tuple)) else (caches,):
                yield name, cache


def block_ids_of(runner: Any, request_id: str) -> Sequence[Sequence[int]]:
    """The numbers of the request's blocks in each KV-cache group, in order. The V2 runner waits for the device."""
    if not is_v2(runner):
        return runner.requests[request_id].block_ids
    tables, request = runner.block_tables, runner.req_states.req_id_to_index[request_id]
    # 0.24 has the numbers of a kernel's smaller blocks, `blocks_per_kv_block` of them per block.
    shares = getattr(tables, "blocks_per_kv_block", None) or [1] * len(tables.block_tables)
    return [
        [number // share for number in table.gpu[request, :count:share].tolist()]
        for table, count, share in zip(tables.block_tables, tables.num_blocks.np[:, request], shares, strict=True)
    ]


def _blocks_of(part: RequestRows, ids: Sequence[int], block_size: int) -> list[int]:
    first = part.first_position // block_size
    last = (part.first_position + part.row_count - 1) // block_size
    return list(ids[first : last + 1])
