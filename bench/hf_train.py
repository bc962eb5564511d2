"""Compares a training step of `HFSteeringModel` with one of the same model with a bare added parameter.

`python -m bench.hf_train`. Both run forward and backward through the same layers: the base is frozen, so gradients end
at the trained layer.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.results import add_arguments, keep
from steer_service.hf import HFSteeringModel
from steer_service.hf.bundled_model import ensure_bundled_model

LAYER = 15
ROWS, TOKENS = 4, 128


def step_of(model: Any, batch: dict[str, torch.Tensor], parameter: torch.nn.Parameter) -> Callable[[], float]:
    def step() -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        parameter.grad = None
        return time.perf_counter() - start

    return step


def bare_model(folder: Path) -> tuple[Any, torch.nn.Parameter]:
    """A frozen model whose layer LAYER adds a parameter to its output, and that parameter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    parameter = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
    model.model.layers[LAYER].register_forward_hook(lambda _, __, output: output + parameter)
    return model, parameter


def measure(rounds: int) -> dict[str, float]:
    folder = ensure_bundled_model()
    tokens = torch.randint(100, 40_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    ours = HFSteeringModel(folder, target_layers=[LAYER], init_scale=0.1, dtype=torch.float32)
    steps = [
        step_of(pair[0], batch, pair[1]) for pair in (bare_model(folder), (ours, *ours.get_trainable_parameters()))
    ]
    for step in steps:
        step()
    ratios, bare_s = [], []
    for _ in range(rounds):
        bare, steered = (min(step() for _ in range(2)) for step in steps)
        ratios.append(steered / bare)
        bare_s.append(bare)
    return {"hf_train_ratio": round(median(ratios), 4), "hf_train_bare_s": round(median(bare_s), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hf_train", description=__doc__)
    add_arguments(parser, rounds=9)
    options = parser.parse_args()
    keep(measure(options.rounds), options.out)


if __name__ == "__main__":
    main()
