"""CPU time of our server process per token with metrics, traces and logs, and without: `python -m bench.observability`.

Servers around the fake backend run at the same time, each with a client in a process of its own: what else the machine
does slows all alike. The metrics of two of them are read every five seconds. One of these also sends a span of each
call to a collector, and logs the call. After a few rounds all processes are new ones. A token of the fake backend costs
next to nothing, and what observing costs is thus a larger share than with any engine.
"""

import argparse
import socket
import statistics
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from bench.child import CLIENT, FAKE
from bench.load import Batch
from bench.process import Child, ChildFailed
from bench.results import add_arguments, add_minutes, keep, numbers
from bench.run import FAILED, say
from bench.service import spread

PLAIN, METRICS, TRACES = "plain", "metrics", "metrics_and_traces"
VARIANTS = (PLAIN, METRICS, TRACES)
"""The servers; the first is the one that the others are compared with."""

STREAMS = 32
"""Streams of each server."""

TOKENS = 1000
"""Tokens of each stream: a round takes longer than the time between two readings."""

SCRAPE_S = 5.0
"""Seconds between two readings of the metrics."""

ROUNDS_OF_A_PROCESS = 4
"""Rounds after which processes are replaced: each has its own luck with its memory."""


def measure(rounds: int, minutes: float, tokens: int) -> dict[str, Any]:
    """The results of all rounds: microseconds of processor time per token, and the ratio within each round."""
    used: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with ExitStack() as stack:
        for number in numbers(rounds, minutes):
            if number % ROUNDS_OF_A_PROCESS == 0:
                stack.close()
                servers = {variant: stack.enter_context(_server(variant)) for variant in VARIANTS}
                _run(servers, number, tokens // 10)
            for variant, microseconds in _run(servers, number, tokens).items():
                used[variant].append(microseconds)
            say(", ".join(f"{variant}: {found[-1]:.1f} us per token" for variant, found in used.items()))
    return {
        "observability": {
            "microseconds_per_token": {variant: spread(found) for variant, found in used.items()},
            **{
                f"{variant}_vs_plain": _ratio(found, used[PLAIN]) for variant, found in used.items() if variant != PLAIN
            },
        }
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """A server, and the client that loads it."""

    process: psutil.Process
    client: Child

    def run(self, number: int, tokens: int) -> float:
        """One batch; returns microseconds of the server's processor time per token."""
        batch = Batch(mode="idle", number=number, max_tokens=tokens, requests=STREAMS, prompt_tokens=1)
        before = _cpu_seconds(self.process)
        timing = self.client.run(batch)
        return 1e6 * (_cpu_seconds(self.process) - before) / timing.tokens


@contextmanager
def _server(variant: str) -> Iterator[_Server]:
    port = 0 if variant == PLAIN else _free_port()
    with (
        _collector() if variant == TRACES else nullcontext("") as endpoint,
        Child(FAKE, f"{port},{endpoint}") as server,
        Child(CLIENT, server.facts["address"]) as client,
        _read_metrics(port) if port else nullcontext(),
    ):
        yield _Server(process=psutil.Process(server.facts["pid"]), client=client)


def _run(servers: Mapping[str, _Server], number: int, tokens: int) -> dict[str, float]:
    """One round: all servers at the same time."""
    with ThreadPoolExecutor(len(servers)) as pool:
        running = {variant: pool.submit(server.run, number, tokens) for variant, server in servers.items()}
        return {variant: one.result() for variant, one in running.items()}


def _ratio(ours: list[float], plain: list[float]) -> dict[str, Any]:
    """The median of the rounds' ratios, and an interval that has the true one with 95 %."""
    ratios = sorted(one / other for one, other in zip(ours, plain, strict=True))
    # Ranks of the binomial distribution: the median is between the k-th lowest and the k-th highest.
    k = max(0, round((len(ratios) - 1.96 * len(ratios) ** 0.5) / 2) - 1)
    return {
        "median": round(statistics.median(ratios), 4),
        "interval_95": [round(ratios[k], 4), round(ratios[-1 - k], 4)],
        "rounds": len(ratios),
    }


@contextmanager
def _read_metrics(port: int) -> Iterator[None]:
    over = threading.Event()

    def read() -> None:
        while not over.wait(SCRAPE_S):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SCRAPE_S) as page:
                page.read()

    reading = threading.Thread(target=read)
    reading.start()
    try:
        yield
    finally:
        over.set()
        reading.join()


@contextmanager
def _collector() -> Iterator[str]:
    """The address of a collector of traces that throws them away."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    service = grpc.method_handlers_generic_handler(
        "opentelemetry.proto.collector.trace.v1.TraceService", {"Export": handler}
    )
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, handlers=[service])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.observability", description=__doc__)
    add_arguments(parser, rounds=12)
    add_minutes(parser)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each stream (default: %(default)s)")
    options = parser.parse_args()
    try:
        results = measure(options.rounds, options.minutes, options.tokens)
    except ChildFailed as error:
        say(str(error))
        return FAILED
    keep(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
