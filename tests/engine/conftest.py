"""Engines shared by all tests that need the same arguments."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from steer_service.engine import VLLMSteeringModel
from tests.tiny_models import ModelFolder

BLOCK = 32
"""Tokens of a KV block: small, so that short prompts span several."""

ENGINE_ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,  # so that most prompts here take several steps
    "steer_constraint_seconds": 1,
    "steer_slots": 8,  # one more than the programs of the mixed batch
    "disable_log_stats": True,
}


@pytest.fixture(scope="session")
def llama(model_folder: ModelFolder) -> Iterator[VLLMSteeringModel]:
    """A running engine on the tiny Llama."""
    with VLLMSteeringModel(str(model_folder("llama")), **ENGINE_ARGUMENTS) as model:
        model.generate_sync(["Warm up"], max_tokens=1)  # threads that vLLM starts at its first request are not a test's
        yield model


def own_segments() -> set[str]:
    """Names of this project's shared-memory segments on this host."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("steerllm-")}
