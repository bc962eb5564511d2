"""Tiny random models of each family, and engines shared by all tests that need the same arguments."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from steer_service.engine.model import VLLMSteeringModel
from steer_service.hf.embedded import ensure_embedded_model

LAYERS = 4
WIDTH = 128
BLOCK = 32
"""Tokens of a KV block: small, so that short prompts span several."""

CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config, "mistral": MistralConfig}

ENGINE_ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 32,
    "steer_slots": 4,
    "disable_log_stats": True,
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Makes (once per family) the folder of a random 4-layer float32 model with the embedded model's tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            _make_model(CONFIGS[family], folder)
        return folder

    return make


def _make_model(config_class: type[PretrainedConfig], folder: Path) -> None:
    embedded = ensure_embedded_model()
    torch.manual_seed(0)
    config = config_class(
        vocab_size=json.loads((embedded / "config.json").read_text())["vocab_size"],
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,  # large enough that rows differ well above rounding
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded / name, folder / name)


@pytest.fixture(scope="session")
def llama(model_folder) -> Iterator[VLLMSteeringModel]:  # type: ignore[no-untyped-def]
    """A running engine on the tiny Llama."""
    with VLLMSteeringModel(str(model_folder("llama")), **ENGINE_ARGUMENTS) as model:
        yield model


def own_segments() -> set[str]:
    """Names of this project's shared-memory segments on this host."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("steerllm-")}
