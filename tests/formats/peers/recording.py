"""Records what a project makes of the model with a file of vectors, beside the file.

`<file>.safetensors` holds `token_ids`, a prompt and what was generated greedily, and `streams`, shape [layers,
tokens - 1, width], the stream after each decoder layer; with `scale` and `prompt_tokens` as metadata. `model` is a
random Llama with its tokenizer. It needs no project: `make.py` and `make_more.py` do.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent

LAYERS = 4
WIDTH = 16
NEW_TOKENS = 6
SCALE = 1.5
PROMPT = "music makes me happy and rain makes me"

Applied = Callable[[Any, Path], AbstractContextManager[None]]
"""(model, file) -> a block in which the model is steered with the file, by the project whose file it is."""


def directions(*layers: int) -> dict[int, np.ndarray]:
    return {layer: np.random.default_rng(layer).normal(size=WIDTH).astype(np.float32) for layer in layers}


def saved_model() -> tuple[Any, Any]:
    """The model and its tokenizer, as `make.py` saved them."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(HERE / "model")


@torch.no_grad()
def record(
    name: str,
    model: Any,
    tokenizer: Any,
    steers: Applied,
    *,
    scale: float = SCALE,
    takers: Sequence[torch.nn.Module] | None = None,
) -> None:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with steers(model, HERE / name):
        tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        streams = streams_of(model, tokens[:, :-1], takers or [*model.model.layers[1:], model.model.norm])
    save_file(
        {"token_ids": tokens[0], "streams": streams},
        HERE / f"{name}.safetensors",
        {"scale": str(scale), "prompt_tokens": str(prompt["input_ids"].shape[1])},
    )


def streams_of(model: Any, token_ids: torch.Tensor, takers: Sequence[torch.nn.Module]) -> torch.Tensor:
    """The stream after each decoder layer, as that which comes next is given it, whoever has changed it before.

    `takers` is what comes next, for each layer.
    """
    found: list[torch.Tensor] = []
    hooks = [taker.register_forward_pre_hook(lambda _, given: found.append(given[0][0].clone())) for taker in takers]
    model(token_ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)
