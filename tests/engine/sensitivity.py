"""How far captured rows are from float64, and how far the model itself carries roundings of its stream.

`python -m tests.engine.sensitivity` measures the table of docs/numerics.md: rows that the real engine captured against
transformers in float64 with the same weights; `--run bundled float32 --more 20` measures one line, of more prompts.

T: tokens of a prompt; N: rows of all prompts and layers.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.runtime.results import collect
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.engine.oracle import Oracle, relative_errors
from tests.tiny_models import CONFIGS, make_model

Streams = dict[int, npt.NDArray[np.float64]]
"""Layer -> an array with one entry or row for each token."""

UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""The relative error of rounding a number once to the dtype."""

FACTORS, FLOOR = {"float32": 64.0, "bfloat16": 16.0}, 8.0
"""A captured row is at most factor * sensitivity + FLOOR * unit from float64; see docs/numerics.md."""

DRAWS = 8
"""Draws of a sensitivity: a row that a few roundings move far may be missed by two."""

RUNS = (("llama", "float32"), ("llama", "bfloat16"), ("bundled", "float32"), ("bundled", "bfloat16"))
"""Model and dtype."""

TEXTS = (
    "The sea is calm tonight, the tide is full, the moon lies fair upon the straits.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3]))",
    "Dear Sir or Madam, I am writing to you about the invoice of 3 March, number 4711.",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
    "Question: What is the capital of France?\nAnswer:",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


def prompts(folder: Path, more: int = 0) -> list[list[int]]:
    """Texts, random tokens and one token again and again: rows of every kind of sensitivity.

    `more`: further prompts of random tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = np.random.default_rng(0)
    return [
        *(tokenizer.encode(text) for text in TEXTS),
        *rng.integers(3, len(tokenizer), size=(3, 32)).tolist(),
        [int(rng.integers(3, len(tokenizer)))] * 32,
        *rng.integers(3, len(tokenizer), size=(more, 32)).tolist(),
    ]


def sensitivities(oracle: Oracle, token_ids: Sequence[int], dtype: str, exact: Streams) -> Streams:
    """Layer -> how far one rounding of all that layers and their matrices read moves each row; shape [T].

    Relative to the norm of the row; the largest of DRAWS, see `Oracle.perturbed`. `exact` are the oracle's streams.
    """
    moved = [oracle.perturbed(token_ids, UNITS[dtype], alike=draw % 2 == 1, seed=draw // 2) for draw in range(DRAWS)]
    return {layer: np.max([relative_errors(one[layer], exact[layer]) for one in moved], axis=0) for layer in exact}


def bound(sensitivity_T: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """The largest distance from float64 of captured rows with this sensitivity, relative to the row."""
    return FACTORS[dtype] * sensitivity_T + FLOOR * UNITS[dtype]


def rounded_weights(dtype: str) -> Any:
    """A change of the oracle's model: its weights as the engine has them."""

    def mend(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype)).double()

    return mend


def summary(numbers_N: npt.NDArray[np.float64]) -> str:
    """Median, 99th percentile and maximum."""
    return " / ".join(f"{number:.2g}" for number in (*np.percentile(numbers_N, [50, 99]), numbers_N.max()))


def captured_by_the_engine(folder: Path, dtype: str, asked: Sequence[Sequence[int]]) -> list[Streams]:
    """The rows that the engine captures of each prompt, at all layers."""
    with VLLMSteeringModel(str(folder), **{**ENGINE_ARGUMENTS, "dtype": dtype}) as model:
        requests = [
            GenerateRequest(
                prompt=TokenPrompt(token_ids=tokens),
                sampling=SamplingOptions(max_tokens=1),
                capture=CaptureSpec(layers=range(model.layer_count)),
            )
            for tokens in asked
        ]
        return asyncio.run(_captures(model, requests))


def judged(name: str, folder: Path, dtype: str, asked: Sequence[Sequence[int]]) -> str:
    """A line of the table."""
    captured = captured_by_the_engine(folder, dtype, asked)
    oracle = Oracle(folder, rounded_weights(dtype))
    errors, sensitivity = [], []
    for tokens, rows in zip(asked, captured, strict=True):
        exact = oracle.streams(tokens, None)
        moved = sensitivities(oracle, tokens, dtype, exact)
        for layer in exact:
            errors.append(relative_errors(rows[layer], exact[layer]))
            sensitivity.append(moved[layer])
    error_N, sensitivity_N = np.concatenate(errors), np.concatenate(sensitivity)
    columns = (error_N, sensitivity_N, error_N / sensitivity_N, error_N / bound(sensitivity_N, dtype))
    return f"| {name} | {dtype} | {len(asked)} | {len(error_N)} | " + " | ".join(map(summary, columns)) + " |"


async def _captures(model: VLLMSteeringModel, requests: Sequence[GenerateRequest]) -> list[Streams]:
    generations = await asyncio.gather(*(collect(model.submit(request)) for request in requests))
    return [dict(generation.outputs[0].captures) for generation in generations]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--more", type=int, default=0, help="further prompts, of random tokens")
    parser.add_argument("--run", nargs=2, action="append", metavar=("MODEL", "DTYPE"), help="default: all four")
    options = parser.parse_args()
    print("| model | dtype | prompts | rows | error | sensitivity | error / sensitivity | error / bound |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name, dtype in options.run or RUNS:
            folder = ensure_bundled_model() if name == "bundled" else Path(scratch) / name
            if not folder.exists():
                make_model(CONFIGS[name], folder)
            print(judged(name, folder, dtype, prompts(folder, options.more)), flush=True)


if __name__ == "__main__":
    main()
