"""Makes the model known to vLLM in every process: an entry point of `vllm.general_plugins` that lies on PYTHONPATH."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engine.deterministic_model import rules

ARCHITECTURE = "DeterministicForCausalLM"


def register() -> None:
    """What vLLM calls when a process of it starts."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        from tests.engine.deterministic_model.model import DeterministicForCausalLM

        ModelRegistry.register_model(ARCHITECTURE, DeterministicForCausalLM)


def make_folder(folder: Path) -> Path:
    """A folder that vLLM loads as a model, with the bundled model's tokenizer."""
    from steer_service.hf.bundled_model import ensure_bundled_model

    folder.mkdir(parents=True)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",  # transformers knows this one's fields, and needs no plugin of its own
        "vocab_size": rules.VOCABULARY,
        "hidden_size": rules.WIDTH,
        "intermediate_size": rules.WIDTH,
        "num_hidden_layers": rules.LAYERS,
        "num_attention_heads": rules.HEADS,
        "num_key_value_heads": rules.HEADS,
        "head_dim": rules.HEAD_SIZE,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ensure_bundled_model() / name, folder / name)
    return folder


@contextmanager
def plugged_in(folder: Path) -> Iterator[None]:
    """Within the block, this process and those that it starts know the model; `folder` is for the entry point."""
    information = folder / "steerllm_deterministic-1.0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: steerllm-deterministic\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nsteerllm_deterministic = {__name__}:register\n"
    )
    before = os.environ.get("PYTHONPATH")
    repository = Path(__file__).parents[3]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(repository), *([before] if before else [])])
    sys.path.append(str(folder))
    register()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
