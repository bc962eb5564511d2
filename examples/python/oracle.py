"""Read a captured row with another prompt: patchscopes and activation oracles.

The row of a word is captured in one prompt, and put in place of the row of a placeholder in another prompt, whose text
does not have the word. The model then answers about a word that it was never shown.

Steering adds vectors, so the row that was there is captured too, and the difference is added at that one position. An
activation oracle that was trained with its vectors added relative to the row's norm needs no difference:
`AddSpec(vector, positions=position, scaling="relative")`.

    python examples/python/oracle.py
"""

import argparse
import sys

import numpy as np

from steer_client import AddSpec, CaptureSpec, LayerSteeringSpec, SteerClient, SteerError, SteeringSpec

LAYER = 3
"""An early layer: later ones compute the answer from what stands there."""
CAPITALS = {"Japan": " Tokyo", "France": " Paris", "Italy": " Rome"}
ONE = "The capital of x is"
TWO = "sun moon: moon; cat dog: dog; king queen: queen; x y:"


def row_at(model: SteerClient, prompt: str, word: str) -> tuple[int, np.ndarray]:
    """The position of the last token of `word`, which is in `prompt`, and its row after `LAYER`."""
    start = prompt.rindex(word)
    places = model.render(prompt).offsets or ()
    position = max(index for index, (first, end) in enumerate(places) if first < start + len(word) and end > start)
    capture = CaptureSpec(layers=[LAYER], positions=position, dtype="float32")
    _, [handle] = model.generate(prompt, max_tokens=0, capture=capture)
    return position, handle.fetch()[LAYER][0]["hidden"][0]


def inject(model: SteerClient, prompt: str, rows: dict[str, np.ndarray]) -> SteeringSpec:
    """Puts each row in place of the row of a word of `prompt`: one operation for each, at a position of its own."""
    operations = []
    for placeholder, row in rows.items():
        position, present = row_at(model, prompt, placeholder)
        operations.append(AddSpec(row - present, positions=position))
    return SteeringSpec(layers={LAYER: LayerSteeringSpec(operations)})


def read_out(model: SteerClient, prompt: str, rows: dict[str, np.ndarray], answers: list[str]) -> str:
    """The log-probability of each answer after `prompt`, with `rows` in it."""
    scores = model.score(prompt, answers, steering_spec=inject(model, prompt, rows) if rows else None)
    return "".join(f"{score.total:9.2f}" for score in scores)


def show(model: SteerClient) -> None:
    names, countries = list(CAPITALS.values()), list(CAPITALS)
    rows = [row_at(model, f"I have never been to {country}", country)[1] for country in countries]
    print(f"{ONE!r}: log-probabilities\n{'row in place of x':18}" + "".join(f"{name:>9}" for name in names))
    print(f"{'none':18}" + read_out(model, ONE, {}, names))
    for country, row in zip(countries, rows, strict=True):
        print(f"{country:18}" + read_out(model, ONE, {"x": row}, names))

    words = [" apple", " river"]
    apple, river = (row_at(model, "The word is" + word, word.strip())[1] for word in words)
    print(f"\n{TWO!r}\n{'rows of x and y':18}" + "".join(f"{word:>9}" for word in words))
    print(f"{'apple, river':18}" + read_out(model, TWO, {"x": apple, "y": river}, words))
    print(f"{'river, apple':18}" + read_out(model, TWO, {"x": river, "y": apple}, words))


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads captured rows by putting them into another prompt.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of `steer serve` (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        with SteerClient(arguments.address) as model:
            show(model)
    except SteerError as error:
        sys.exit(f"oracle.py: {error}")


if __name__ == "__main__":
    main()
