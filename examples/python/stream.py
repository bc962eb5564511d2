"""Stream text as the model generates it, and stop early.

python examples/python/stream.py
python examples/python/stream.py --prompt "The desert is" --address 127.0.0.1:50051
"""

import argparse
import sys
from contextlib import closing

from steer_client import SteerClient, SteerError


def first_sentence(model: SteerClient, prompt: str) -> str:
    """Prints the continuation of `prompt` piece by piece, until its first sentence ends."""
    text = ""
    with closing(model.stream(prompt, max_tokens=60, temperature=0.0)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
            if "." in text:
                break  # closing the iterator ends the request on the server too
    print()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints text while the model generates it, up to the first full stop.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of `steer serve` (default: %(default)s)")
    parser.add_argument("--prompt", default="The capital of France is", help="text to continue (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        with SteerClient(arguments.address) as model:
            print(f"[{model.model_name}] {arguments.prompt}", end="")
            first_sentence(model, arguments.prompt)
    except SteerError as error:
        sys.exit(f"stream.py: {error}")


if __name__ == "__main__":
    main()
