"""Random models of each family, small enough that a test can recompute them in float64."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from steer_service.hf.bundled_model import ensure_bundled_model

LAYERS = 4
WIDTH = 128

ModelFolder = Callable[[str], Path]
"""Family -> the folder of its model, made on first use."""

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}


WRITES_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
CONTENT = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
ALL_FIELDS = (
    "{{ '<|im_start|>' + (message['name'] or message['role']) + '\n' + (message['reasoning_content'] or '') }}"
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
    "{{ '\n' + call.id + ' ' + call.function.name + ' ' + call.function.arguments | tojson }}{% endfor %}"
    "{{ (' for ' + message['tool_call_id'] if message['tool_call_id'] else '') + '<|im_end|>' + '\n' }}"
)
"""What the template writes of a message, and what it writes here: every field that a message may have."""
THINKS = "{% if add_generation_prompt and enable_thinking %}{{ '<think>\n' }}{% endif %}"
"""Around the template of the bundled model, which has neither tools nor arguments."""


def make_model(config_class: type[PretrainedConfig], folder: Path) -> None:
    bundled = ensure_bundled_model()
    torch.manual_seed(0)
    config = config_class(
        vocab_size=json.loads((bundled / "config.json").read_text())["vocab_size"],
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
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder / name)
    template = (bundled / "chat_template.jinja").read_text()
    assert CONTENT in template
    template = template.replace(CONTENT, ALL_FIELDS)
    (folder / "chat_template.jinja").write_text(WRITES_TOOLS + template + THINKS)
