"""Measures the time to the first token: what the service adds, and what a reused prefix saves.

`python -m bench.first_token`. The service adds two times: until the server passes the request to the engine, and from
the engine's first token until the client has it. The model's own time differs between requests by more than that. So
the client's and the engine's time are measured in the same request, and the model's time cancels.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from statistics import median
from typing import Any

from bench.child import CLIENT, INSIDE, OURS
from bench.load import Batch
from bench.process import Child, ChildFailed
from bench.results import add_arguments, keep
from bench.run import FAILED, RESULTS, Turns, say
from bench.service import SERVICE, spread, start, worsened

PREFIX_TOKENS = 1000
SINGLE_TURNS = 10
"""Single requests per round."""


def measure(rounds: int, dtype: str) -> dict[str, Any]:
    """The results of all rounds."""
    with ExitStack() as stack:
        children = start(stack, dtype, ())
        turns = Turns(children, lambda _: (CLIENT, OURS))
        for _ in range(SINGLE_TURNS):  # warm up
            _added_ms(turns, children[OURS])
        added_ms = [median(_added_ms(turns, children[OURS]) for _ in range(SINGLE_TURNS)) for _ in range(rounds)]
        prefixes = [_second_over_first(turns, number) for number in range(rounds)]
    results = {"ttft_added_ms": spread(added_ms), "steered_prefix_ttft": spread(prefixes)}
    medians = {name: middle for name, (middle, _, _) in results.items()}
    spreads = {name: [low, high] for name, (_, low, high) in results.items()}
    return {**medians, "first_token": {"rounds": rounds, "dtype": dtype, "spread": spreads}}


def _added_ms(turns: Turns, server: Child) -> float:
    """The client's time to the first token of a request less the engine's, in milliseconds."""
    at_client = turns.take(SERVICE, "idle", 1, requests=1).first_token_s
    inside = server.run(Batch(mode=INSIDE, number=0, max_tokens=1)).first_token_s
    return 1000 * (at_client - inside)


def _second_over_first(turns: Turns, number: int) -> float:
    """The time to the first token of a repeated steered request with a long prompt, relative to the first request."""
    load = {"mode": "add_one_layer", "number": 10**6 + number, "max_tokens": 1, "requests": 1}
    first, second = (
        turns.run(SERVICE, Batch(**load, prompt_tokens=PREFIX_TOKENS, is_repeat=is_repeat)).first_token_s
        for is_repeat in (False, True)
    )
    return second / first


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_token", description=__doc__)
    add_arguments(parser, rounds=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="fail if a result is worse than in bench/results.json")
    options = parser.parse_args()
    try:
        results = measure(options.rounds, options.dtype)
    except ChildFailed as error:
        say(str(error))
        return FAILED
    keep(results, options.out)
    worse = worsened("first_token", results, json.loads(RESULTS.read_text())) if options.check else []
    for line in worse:
        say(line)
    return FAILED if worse else 0


if __name__ == "__main__":
    sys.exit(main())
