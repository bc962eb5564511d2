"""Runs the load of `add_one_layer` with transformers' `generate` and a hook, for scale: `python -m bench.hf_hooks`.

All requests are one batch of equal lengths, the best case of `generate`. Each has a vector of its own.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.load import REQUESTS, Batch, programs_for, prompts_for
from bench.results import add_arguments, keep
from bench.run import TOKENS
from steer_service.hf.bundled_model import ensure_bundled_model


def measure(rounds: int, dtype: str) -> dict[str, Any]:
    """Tokens per second, the median over rounds."""
    model: Any = AutoModelForCausalLM.from_pretrained(ensure_bundled_model(), dtype=getattr(torch, dtype))
    config = model.config
    layers = config.num_hidden_layers
    specs = programs_for("add_one_layer", REQUESTS, REQUESTS, 3, layers, config.hidden_size)
    added_RD = torch.stack(
        [torch.from_numpy(spec.layers[layers // 2].operations[0].materialize()) for spec in specs if spec is not None]
    )
    model.model.layers[layers // 2].register_forward_hook(
        lambda _, __, output: (output.float() + added_RD[:, None]).to(output.dtype)
    )
    speeds = []
    for number in range(rounds + 1):
        prompts = prompts_for(Batch(mode="add_one_layer", number=number, max_tokens=TOKENS), config.vocab_size)
        started = time.perf_counter()
        tokens = torch.tensor(prompts)
        whole = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=TOKENS,
            max_new_tokens=TOKENS, pad_token_id=config.eos_token_id,
        )  # fmt: skip
        assert whole.shape == (REQUESTS, tokens.shape[1] + TOKENS)
        speeds.append(REQUESTS * TOKENS / (time.perf_counter() - started))
    return {"hf_hooks": round(median(speeds[1:]), 1)}  # the first was a warm-up


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hf_hooks", description=__doc__)
    add_arguments(parser, rounds=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    options = parser.parse_args()
    keep(measure(options.rounds, options.dtype), options.out)


if __name__ == "__main__":
    main()
