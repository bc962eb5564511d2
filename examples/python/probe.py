"""Train a linear probe on captured rows, and test it on words that it has never seen.

The sentences are "The film was wonderful." and the like, of 8 subjects and 40 adjectives. The probe reads the row of
the full stop, a token that is the same in all of them. It is trained on 24 adjectives and tested on the 16 others, so
that it cannot pass by remembering words. Early layers know little of the sentence at its full stop, later ones do.

    python examples/python/probe.py
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from steer_client import CaptureSpec, SteerClient, SteerError

SUBJECTS = (
    *("The film", "My new phone", "The service at the hotel", "Our teacher"),
    *("The food", "This book", "The weather", "Her speech"),
)
ADJECTIVES = json.loads((Path(__file__).parent / "data" / "adjectives.json").read_text("utf-8"))
TRAINED = 12
"""Adjectives of each kind to train with; the others are held out."""


def labelled(good: list[str], bad: list[str]) -> tuple[list[str], np.ndarray]:
    """Sentences, and 1 for each with a good adjective, 0 for each with a bad one."""
    sentences = [f"{subject} was {adjective}." for subject in SUBJECTS for adjective in good + bad]
    return sentences, np.tile(np.repeat([1, 0], [len(good), len(bad)]), len(SUBJECTS))


def last_rows(model: SteerClient, texts: list[str], layers: list[int]) -> dict[int, np.ndarray]:
    """Layer -> the row of the last token of each text, float32, shape [texts, hidden_size]."""
    capture = CaptureSpec(layers=layers, positions=-1, dtype="float32")
    _, handles = model.generate(texts, max_tokens=0, capture=capture)
    captures = [handle.fetch() for handle in handles]
    return {layer: np.concatenate([one[layer][0]["hidden"] for one in captures]) for layer in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a linear probe at several layers.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of `steer serve` (default: %(default)s)")
    arguments = parser.parse_args()
    good, bad = ADJECTIVES["good"], ADJECTIVES["bad"]
    texts, labels = labelled(good[:TRAINED], bad[:TRAINED])
    unseen, unseen_labels = labelled(good[TRAINED:], bad[TRAINED:])
    try:
        with SteerClient(arguments.address) as model:
            layers = list(range(0, model.layer_count, 3))
            rows, unseen_rows = last_rows(model, texts, layers), last_rows(model, unseen, layers)
    except SteerError as error:
        sys.exit(f"probe.py: {error}")
    print(f"{len(texts)} sentences to train with, {len(unseen)} with unseen adjectives\nlayer  held-out accuracy")
    for layer in layers:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        probe.fit(rows[layer], labels)
        print(f"{layer:5}  {probe.score(unseen_rows[layer], unseen_labels):.3f}")


if __name__ == "__main__":
    main()
