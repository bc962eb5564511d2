"""Compares throughput through our service with the bare engine and with vLLM's own servers: `python -m bench.service`.

Our engine with a server around it, our client, `vllm serve` and `vllm serve --grpc` are all loaded and take turns.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

from bench.child import CLIENT, HTTP, OURS, VLLM_GRPC
from bench.process import Child, ChildFailed
from bench.results import add_arguments, add_minutes, keep, numbers
from bench.run import FAILED, IDLE_CPU_LIMIT, RESULTS, Turns, say
from steer_service.hf.bundled_model import ensure_bundled_model

STREAMS = 64
TOKENS = 32

ENGINE, SERVICE = "engine", "service"
PARTICIPANTS = {ENGINE: (OURS,), SERVICE: (CLIENT, OURS), HTTP: (HTTP,), VLLM_GRPC: (VLLM_GRPC,)}
"""Turn -> the kinds of children that are busy in it; the first gets the batch."""

BETTER_IF_LESS = frozenset({"ttft_added_ms", "steered_prefix_ttft"})


def start(stack: ExitStack, dtype: str, peers: Sequence[str]) -> dict[str, Child]:
    """The children by kind; leaving `stack` ends them."""
    model = str(ensure_bundled_model(say))
    children = {kind: stack.enter_context(Child(kind, model, "--dtype", dtype)) for kind in (OURS, *peers)}
    children[CLIENT] = stack.enter_context(Child(CLIENT, children[OURS].facts["address"]))
    return children


def measure(rounds: int, minutes: float, dtype: str, peers: Sequence[str]) -> dict[str, Any]:
    """The results of all rounds."""
    with ExitStack() as stack:
        turns = Turns(start(stack, dtype, peers), PARTICIPANTS.__getitem__)
        names = (ENGINE, SERVICE, *peers)
        for name in names:
            turns.take(name, "idle", 2, requests=STREAMS)
        speeds = [_speeds(turns, names if number % 2 == 0 else names[::-1]) for number in numbers(rounds, minutes)]
        results = {
            "through_grpc": _ratio(speeds, SERVICE, ENGINE),
            **{f"vs_{name if name == VLLM_GRPC else 'vllm_http'}": _ratio(speeds, SERVICE, name) for name in peers},
        }
        if turns.idle_cores > IDLE_CPU_LIMIT:
            say(f"NOT RELIABLE: engines used up to {turns.idle_cores:.2f} cores while it was not their turn")
    medians = {name: middle for name, (middle, _, _) in results.items()}
    spreads = {name: [low, high] for name, (_, low, high) in results.items()}
    return {**medians, "service": {"rounds": len(speeds), "dtype": dtype, "streams": STREAMS, "spread": spreads}}


def _speeds(turns: Turns, names: Sequence[str]) -> dict[str, float]:
    return {name: turns.take(name, "idle", TOKENS, requests=STREAMS).tokens_per_s for name in names}


def _ratio(speeds: Sequence[dict[str, float]], ours: str, theirs: str) -> tuple[float, float, float]:
    return spread([speed[ours] / speed[theirs] for speed in speeds])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return round(median(values), 4), round(min(values), 4), round(max(values), 4)


def worsened(part: str, results: Mapping[str, Any], committed: Mapping[str, Any]) -> list[str]:
    """A line for each result that is worse than every round that is committed under `part`."""
    if results[part]["dtype"] != committed[part]["dtype"]:
        return ["cannot compare: another dtype was measured"]
    return [
        f"{name} is {results[name]}; its rounds were {low} to {high}"
        for name, (low, high) in committed[part]["spread"].items()
        if name in results and (results[name] > high if name in BETTER_IF_LESS else results[name] < low)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=__doc__)
    add_arguments(parser, rounds=5)
    add_minutes(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--peers",
        default=f"{HTTP},{VLLM_GRPC}",
        help="vLLM's servers to compare with; may be empty (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="fail if a result is worse than in bench/results.json")
    options = parser.parse_args()
    try:
        peers = [peer for peer in options.peers.split(",") if peer]
        results = measure(options.rounds, options.minutes, options.dtype, peers)
    except ChildFailed as error:
        say(str(error))
        return FAILED
    keep(results, options.out)
    worse = worsened("service", results, json.loads(RESULTS.read_text())) if options.check else []
    for line in worse:
        say(line)
    return FAILED if worse else 0


if __name__ == "__main__":
    sys.exit(main())
