"""Keys and values of rows that went bad: which blocks are zeroed, and caches in which they cannot be found."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steer_service.core.errors import Unsupported
from steer_service.engine.worker import kv_zeroing
from steer_service.engine.worker.kv_zeroing import KVBlockZeroer
from steer_service.ops.plan import RequestRows
from tests.engine.in_process import in_process
from tests.tiny_models import ModelFolder

BLOCKS, BLOCK = 4, 2


def runner_with(**caches: Any) -> Any:
    """As much of a V1 runner as the zeroer knows; its one request has blocks 3, 1 and 2."""
    group = SimpleNamespace(layer_names=[*caches], kv_cache_spec=SimpleNamespace(block_size=BLOCK))
    context = {name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()}
    return SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[group]),
        requests={"one": SimpleNamespace(block_ids=[[3, 1, 2]])},
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context)),
    )


def test_the_blocks_of_bad_rows_are_zeroed_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_zeroing, "is_v2", lambda _: False)
    whole, split, state = torch.ones(BLOCKS, 2, BLOCK), torch.ones(2 * BLOCKS, 3), torch.ones(BLOCKS, 5)
    zeroer = KVBlockZeroer(runner_with(attention=whole, smaller=split, mamba=[state, state.clone()]))

    zeroer.check()
    zeroer.zero([RequestRows("one", 0, 2, 1)])  # positions 1 and 2: of the first and the second block

    assert [bool(block.any()) for block in whole] == [True, False, True, False]
    assert [bool(block.any()) for block in split] == [True, True, False, False, True, True, False, False]
    assert [bool(block.any()) for block in state] == [True, False, True, False]


@pytest.mark.parametrize("caches", [torch.ones(BLOCKS + 1, 2), (torch.ones(BLOCKS), torch.ones(2 * BLOCKS - 1, 2))])
def test_a_cache_that_its_blocks_do_not_divide_is_refused(caches: Any) -> None:
    zeroer = KVBlockZeroer(runner_with(attention=torch.ones(BLOCKS, 2), packed=caches))

    with pytest.raises(Unsupported, match=r"of packed are \[[57](, 2)?\], which 4 blocks do not divide") as refused:
        zeroer.check()
    assert refused.value.reason == "KV_CACHE_LAYOUT"


@pytest.mark.engine
def test_an_engine_with_such_a_cache_does_not_start(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    named = KVBlockZeroer._named_caches

    def packed(self: KVBlockZeroer, group: Any) -> Any:
        return [(name, cache.flatten()[1:]) for name, cache in named(self, group)]

    monkeypatch.setattr(KVBlockZeroer, "_named_caches", packed)
    with in_process(model_folder("llama")) as engine:
        assert engine.report.refusal_reason == "KV_CACHE_LAYOUT"
        assert "could not be zeroed" in engine.report.refusal
