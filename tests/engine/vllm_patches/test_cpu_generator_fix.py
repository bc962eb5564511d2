"""The generators of seeded requests, while a step samples tokens that are thrown away."""

from types import SimpleNamespace

import numpy as np
import pytest

from steer_service.engine.vllm_patches.cpu_generator_fix import without_discarded_generators


def runner(generators: dict[int, str], discarded: list[bool]) -> SimpleNamespace:
    """What is read of vLLM's runner; the mask is longer than the batch and stale beyond it."""
    mask = np.array([*discarded, True, True])
    return SimpleNamespace(
        input_batch=SimpleNamespace(generators=generators, num_reqs=len(discarded)),
        discard_request_mask=SimpleNamespace(np=mask),
    )


def test_only_generators_of_discarded_tokens_are_hidden_and_only_within_the_block() -> None:
    generators = {0: "a", 1: "b", 3: "d"}
    with without_discarded_generators(runner(generators, [False, True, True, False])):
        assert generators == {0: "a", 3: "d"}
    assert generators == {0: "a", 1: "b", 3: "d"}


def test_generators_come_back_when_sampling_fails() -> None:
    generators = {0: "a"}
    with pytest.raises(RuntimeError), without_discarded_generators(runner(generators, [True])):
        raise RuntimeError
    assert generators == {0: "a"}
