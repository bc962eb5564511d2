"""Measures the time from start to a first response, of our server and vLLM's in turns: `python -m bench.startup`."""

import argparse
import asyncio
import sys
import time
from statistics import median
from typing import Any

from bench.child import engine_arguments
from bench.peers import HTTP_SERVER, http_client, vllm_server
from bench.results import add_arguments, keep
from steer_service.cli.server_process import ServerProcess
from steer_service.hf.bundled_model import ensure_bundled_model


async def ours(model: str, arguments: dict[str, Any]) -> float:
    """Seconds until `steer serve` reports that it serves, which is after a first generation."""
    flags = [
        flag
        for name, value in arguments.items()
        if value is not False
        for flag in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
    ]
    started = time.perf_counter()
    async with ServerProcess([model, *flags]) as server:
        await server.wait_until_serving()
        return time.perf_counter() - started


async def theirs(model: str, arguments: dict[str, Any]) -> float:
    """Seconds until vLLM's OpenAI server has completed a request for one token."""
    started = time.perf_counter()
    async with vllm_server(HTTP_SERVER, model, **arguments) as server, http_client(server) as count_tokens:
        await count_tokens((1000,), 1)
        return time.perf_counter() - started


async def measure(rounds: int) -> dict[str, Any]:
    """The medians, and the difference within a round: median, lowest and highest."""
    model, arguments = str(ensure_bundled_model()), engine_arguments("bfloat16", compiled=False)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for start in (theirs, ours) if number % 2 == 0 else (ours, theirs):
            seconds[start.__name__].append(await start(model, arguments))
            print(f"bench: {start.__name__} {seconds[start.__name__][-1]:.1f} s", file=sys.stderr, flush=True)
    added = [ours - theirs for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "ready_s": round(median(seconds["ours"]), 2),
        "vllm_ready_s": round(median(seconds["theirs"]), 2),
        "ready_added_s": round(median(added), 2),
        "startup": {"rounds": rounds, "spread": {"ready_added_s": [round(min(added), 2), round(max(added), 2)]}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    keep(asyncio.run(measure(options.rounds)), options.out)


if __name__ == "__main__":
    main()
