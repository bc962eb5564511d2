"""CPU time of a server process per token at a GPU's rates, without a model: `python -m bench.front_end`.

vLLM's AsyncLLM in a process that drains it, our server, `vllm serve` and `vllm serve --grpc` run on the same stub
executor and take turns. What is measured is the process that serves; the engine core and the clients are others.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil

from bench.child import CLIENT, HTTP, OURS, STUB, VLLM_GRPC
from bench.load import STOCK
from bench.process import Child, ChildFailed
from bench.results import add_arguments, add_minutes, keep, numbers
from bench.run import FAILED, Turns, say
from bench.service import spread
from bench.stub_executor import STEP_SECONDS
from steer_service.hf.bundled_model import ensure_bundled_model

STREAMS = (64, 512, 1024)
TOKENS = 256

SERVICE = "service"
SERVERS = {STOCK: STOCK, SERVICE: OURS, HTTP: HTTP, VLLM_GRPC: VLLM_GRPC}
"""Turn -> the kind of child whose process is measured."""

AT_WORK = {STOCK: (STOCK,), SERVICE: (CLIENT, OURS), HTTP: (HTTP,), VLLM_GRPC: (VLLM_GRPC,)}


def start(stack: ExitStack, peers: Sequence[str]) -> dict[str, Child]:
    """The children by kind; leaving `stack` ends them."""
    model = str(ensure_bundled_model(say))
    children = {kind: stack.enter_context(Child(kind, model, "--dtype", STUB)) for kind in (STOCK, OURS, *peers)}
    children[CLIENT] = stack.enter_context(Child(CLIENT, children[OURS].facts["address"]))
    return children


class Meter:
    """Takes turns, and measures the process that serves."""

    def __init__(self, children: dict[str, Child]) -> None:
        self._turns = Turns(children, AT_WORK.__getitem__)
        self._children = children

    def measure(self, name: str, streams: int, tokens: int, interval: int = 1) -> "Measured":
        """One turn."""
        kinds = (SERVERS[name], *((CLIENT,) if name == SERVICE else ()))
        processes = [psutil.Process(self._children[kind].facts["pid"]) for kind in kinds]
        before = [_cpu_seconds(process) for process in processes]
        timing = self._turns.take(name, "idle", tokens, requests=streams, stream_interval=interval)
        used = [_cpu_seconds(process) - start for process, start in zip(processes, before, strict=True)]
        microseconds = [1e6 * one / timing.tokens for one in used]
        return Measured(
            microseconds=microseconds[0],
            client_microseconds=microseconds[1] if len(microseconds) > 1 else 0.0,
            tokens_per_s=timing.tokens_per_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of one turn."""

    microseconds: float
    """CPU time of the serving process per token."""
    client_microseconds: float
    """CPU time of our client per token; 0 for others."""
    tokens_per_s: float
    """Tokens per second, of all streams."""


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(rounds: int, minutes: float, streams: Sequence[int], peers: Sequence[str]) -> dict[str, Any]:
    """The results of all rounds: for each number of streams, microseconds of each turn."""
    turns = [(STOCK, 1), (SERVICE, 1), (SERVICE, 8), (SERVICE, 0), *((peer, 1) for peer in peers)]
    with ExitStack() as stack:
        meter = Meter(start(stack, peers))
        for name, interval in turns:
            meter.measure(name, max(streams), 8, interval)
        found: dict[str, dict[str, list[Measured]]] = {str(count): {} for count in streams}
        for number in numbers(rounds, minutes):
            for count in streams:
                for name, interval in turns if number % 2 == 0 else turns[::-1]:
                    key = name if interval == 1 else f"{name}_interval_{interval}"
                    measured = meter.measure(name, count, TOKENS, interval)
                    found[str(count)].setdefault(key, []).append(measured)
        return {
            "front_end": {
                "step_seconds": float(os.environ.get(STEP_SECONDS, "0")),
                "streams": {count: _summary(of_count, peers) for count, of_count in found.items()},
            }
        }


def _summary(found: dict[str, list[Measured]], peers: Sequence[str]) -> dict[str, Any]:
    times = {name: [one.microseconds for one in rounds] for name, rounds in found.items()}
    added = {
        f"added_by_{name}": spread([one - stock for one, stock in zip(used, times[STOCK], strict=True)])
        for name, used in times.items()
        if name.startswith(SERVICE)
    }
    ratios = {
        f"vs_{peer}": spread([ours / theirs for ours, theirs in zip(times[SERVICE], times[peer], strict=True)])
        for peer in peers
    }
    return {
        "microseconds_per_token": {name: spread(used) for name, used in times.items()},
        "client_microseconds_per_token": {
            name: spread([one.client_microseconds for one in rounds])
            for name, rounds in found.items()
            if name.startswith(SERVICE)
        },
        "tokens_per_s": {name: spread([one.tokens_per_s for one in rounds])[0] for name, rounds in found.items()},
        **added,
        **ratios,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.front_end", description=__doc__)
    add_arguments(parser, rounds=3)
    add_minutes(parser)
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)), help="default: %(default)s")
    parser.add_argument("--peers", default=f"{HTTP},{VLLM_GRPC}", help="may be empty (default: %(default)s)")
    options = parser.parse_args()
    streams = [int(count) for count in options.streams.split(",")]
    try:
        results = measure(options.rounds, options.minutes, streams, [one for one in options.peers.split(",") if one])
    except ChildFailed as error:
        say(str(error))
        return FAILED
    keep(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
