"""Capture the rows of many prompts as arrays, and look at them.

All tokens of all prompts become the rows of one array, with the prompt, the position and the token of each. The mean
row of a prompt is near the mean rows of prompts about the same subject.

    python examples/python/capture.py
    python examples/python/capture.py --prompts my-prompts.txt --layer 12 --out rows.npz

For data sets that do not fit into memory there is `steer capture`, which writes shards and can be resumed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from steer_client import CaptureSpec, SteerClient, SteerError

PROMPTS = Path(__file__).parent / "data" / "prompts.txt"


def capture(model: SteerClient, prompts: list[str], layer: int) -> dict[str, np.ndarray]:
    """Arrays with one entry for each token: `hidden` [tokens, hidden_size], `prompt`, `position` and `token`."""
    spec = CaptureSpec(layers=[layer], positions="prompt", dtype="float32")
    _, handles = model.generate(prompts, max_tokens=0, capture=spec)
    entries = [handle.fetch()[layer][0] for handle in handles]
    return {
        "hidden": np.concatenate([entry["hidden"] for entry in entries]),
        "prompt": np.repeat(np.arange(len(entries)), [len(entry["hidden"]) for entry in entries]),
        "position": np.concatenate([entry["meta"].positions for entry in entries]),
        "token": np.concatenate([entry["meta"].token_ids for entry in entries]),
    }


def nearest(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """For each prompt the index of the other one whose mean row has the highest cosine with its own."""
    kept = arrays["position"] > 0  # the first row of a sequence is far larger than all others
    count = arrays["prompt"].max() + 1
    means = np.stack([arrays["hidden"][kept & (arrays["prompt"] == index)].mean(axis=0) for index in range(count)])
    means -= means.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosine = means @ means.T
    np.fill_diagonal(cosine, -1)
    return cosine.argmax(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Captures rows of many prompts, and finds prompts that are alike.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of `steer serve` (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a file with one prompt on each line")
    parser.add_argument("--layer", type=int, default=12, help="layer to capture, from 0 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="an .npz file for the arrays")
    arguments = parser.parse_args()
    try:
        prompts = arguments.prompts.read_text("utf-8").splitlines()
        if len(prompts) < 2:
            parser.error(f"{arguments.prompts} has {len(prompts)} prompts; at least two can be compared")
        with SteerClient(arguments.address) as model:
            arrays = capture(model, prompts, arguments.layer)
    except (SteerError, OSError) as error:
        sys.exit(f"capture.py: {error}")
    print({name: array.shape for name, array in arrays.items()})
    for prompt, other in zip(prompts, nearest(arrays), strict=True):
        print(f"{prompt[:50]:50}  is like  {prompts[other][:50]}")
    if arguments.out:
        np.savez(arguments.out, **arrays)


if __name__ == "__main__":
    main()
