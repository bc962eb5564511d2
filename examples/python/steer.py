"""Find a direction for a feeling, steer with it, and check the receipt.

The direction is the difference of two means: of rows of happy sentences and of sad ones, each the row of the last
token. Adding it makes happy words likelier, and subtracting it makes sad words likelier.

    python examples/python/steer.py
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from steer_client import CaptureSpec, SteerClient, SteerError, SteeringSpec

PAIRS = Path(__file__).parent / "data" / "feelings.jsonl"
LAYER = 18
"""Layer of the bundled model at which the two kinds of sentences differ clearly."""
PROMPT = "When I woke up this morning I felt"
SCALES = (-2.0, -1.0, 0.0, 1.0, 2.0)


def last_rows(model: SteerClient, texts: list[str]) -> np.ndarray:
    """The row of the last token of each text after `LAYER`, float32, shape [texts, hidden_size]."""
    capture = CaptureSpec(layers=[LAYER], positions=-1, dtype="float32")
    _, handles = model.generate(texts, max_tokens=0, capture=capture)  # 0: nothing is generated
    return np.concatenate([handle.fetch()[LAYER][0]["hidden"] for handle in handles])


def find_direction(model: SteerClient) -> np.ndarray:
    """The mean row of the happy sentences minus that of the sad ones, shape [hidden_size]."""
    pairs = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    happy = last_rows(model, [pair["positive"] for pair in pairs])
    sad = last_rows(model, [pair["negative"] for pair in pairs])
    return happy.mean(axis=0) - sad.mean(axis=0)


def steer(model: SteerClient, direction: np.ndarray, scale: float) -> None:
    """Generates one line with `scale` times the direction, and checks that the server applied it to every row."""
    steering = SteeringSpec.simple_add(layer=LAYER, vector=direction, scale=scale) if scale else None
    [generation], _ = model.generate([PROMPT], max_tokens=16, temperature=0.0, steering_spec=steering, raw_output=True)
    output, receipt = generation.outputs[0], generation.outputs[0].receipt
    assert receipt.steering_digest == (steering.digest() if steering else "")
    assert receipt.rows_steered == (receipt.rows_total if steering else 0)
    happy, sad = model.score(PROMPT, [" happy", " sad"], steering_spec=steering)
    print(f"{scale:+5.1f} {happy.total - sad.total:+17.2f}  {output.text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Finds a direction for a feeling and steers with it.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of `steer serve` (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        with SteerClient(arguments.address) as model:
            direction = find_direction(model)
            print(f"{PROMPT} ...\nscale  log p(happy)/p(sad)  text")
            for scale in SCALES:
                steer(model, direction, scale)
            print("Every receipt names the steering that was sent, and counts every row as steered.")
    except SteerError as error:
        sys.exit(f"steer.py: {error}")


if __name__ == "__main__":
    main()
