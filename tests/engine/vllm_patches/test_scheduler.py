"""A prefix hit ends at the first captured row. The parts of vLLM are stand-ins; `test_seams.py` checks vLLM itself."""

from typing import Any

import pytest
from vllm import SamplingParams

from steer_service.engine.config import EXTRA_ARGS_KEY
from steer_service.engine.vllm_patches.scheduler import limit_prefix_hits

CACHED = 64


class Coordinator:
    """Has CACHED tokens of every prompt."""

    def find_longest_cache_hit(self, block_hashes: Any, max_cache_hit_length: int) -> int:
        return min(CACHED, max_cache_hit_length)


class Manager:
    def __init__(self) -> None:
        self.coordinator = Coordinator()

    def get_computed_blocks(self, request: Any) -> int:
        if request.fails:
            raise RuntimeError
        return self.coordinator.find_longest_cache_hit((), 1000)


class Request:
    def __init__(self, reusable: int | None, *, fails: bool = False) -> None:
        ours = None if reusable is None else {EXTRA_ARGS_KEY: {"reusable_rows": reusable}}
        self.sampling_params = SamplingParams(extra_args=ours)
        self.fails = fails


@pytest.fixture
def manager() -> Manager:
    manager = Manager()
    limit_prefix_hits(manager)
    return manager


@pytest.mark.parametrize(("reusable", "hit"), [(0, 0), (16, 16), (1000, CACHED), (None, CACHED)])
def test_no_captured_row_comes_from_the_prefix_cache(manager: Manager, reusable: int | None, hit: int) -> None:
    assert manager.get_computed_blocks(Request(reusable)) == hit


def test_the_limit_of_one_request_is_not_that_of_the_next(manager: Manager) -> None:
    with pytest.raises(RuntimeError):
        manager.get_computed_blocks(Request(0, fails=True))
    assert manager.get_computed_blocks(Request(None)) == CACHED
    assert Manager().get_computed_blocks(Request(0)) == CACHED  # other managers are unchanged
