"""Real vLLM with the bundled model: its proof at start, and captures compared with independent computations.

An engine for each dtype answers the requests of traffic.py, 16 at once. Then, for each request:

- its receipt must count what was asked for;
- rows after a steered layer must be what float64 makes of those before it, within the tolerance of docs/numerics.md,
  and rows that are not steered must keep their bits; without the steering, rows must be outside of the tolerance;
- each captured row must be where transformers in float64 has it, within the bound of its sensitivity.

A line of JSON is printed each time that more is known. The exit status is 1 if a request failed.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.child import engine_arguments
from bench.on_gpu.readings import FIGURES
from bench.on_gpu.traffic import Asked, requests_for
from steer_service.core.errors import SteerError
from steer_service.runtime.results import collect
from steer_service.server.event_loop import new_event_loop

if TYPE_CHECKING:
    from bench.on_gpu.comparison import Answer, Findings  # vLLM's own processes import this file again, without torch

REQUESTS = 50
AT_ONCE = 16
"""Requests in flight: as one ends, the prompt of the next shares steps with tokens of the others."""


def main() -> int:
    """Runs engines and comparisons, and prints what was found; returns the exit status."""
    from bench.on_gpu.comparison import Findings, check, compare_with_model
    from bench.on_gpu.reference import Reference
    from steer_service.hf.bundled_model import ensure_bundled_model

    options = parse_options()
    found: dict[str, Findings] = {}

    def report() -> None:
        # Progress bars leave lines unfinished.
        print(f"\n{FIGURES}{json.dumps({dtype: asdict(one) for dtype, one in found.items()})}", flush=True)

    folder, reference = ensure_bundled_model(), None
    for dtype in options.dtypes:
        findings = found[dtype] = Findings()
        if dtype == "float32":
            os.environ["TRITON_F32_DEFAULT"] = "ieee"  # vLLM's attention would multiply in tf32
        answers: list[Answer] = []
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                answers = runner.run(serve(folder, dtype, options, findings, report))
        except SteerError as error:
            findings.failures.append(f"the engine: {error}")
        complete = check(answers, dtype, findings)
        report()
        if complete:
            reference = reference or Reference(folder, options.device)
            compare_with_model(reference, complete, dtype, findings)
            report()
    return 1 if any(findings.failures for findings in found.values()) else 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu.conformance", description=__doc__)
    parser.add_argument("--device", required=True, choices=("cuda", "cpu"))
    parser.add_argument("--dtypes", required=True, type=lambda text: text.split(","), metavar="DTYPE,DTYPE")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help="default: %(default)s")
    return parser.parse_args()


async def serve(
    folder: Path, dtype: str, options: argparse.Namespace, findings: "Findings", report: Callable[[], None]
) -> "list[Answer]":
    """Starts an engine, has it answer the requests, and closes it; those that fail are in `findings`."""
    from bench.on_gpu.comparison import Answer
    from steer_service.engine.engine import VLLMEngine

    began = time.monotonic()
    engine = await VLLMEngine.start(str(folder), **engine_arguments(dtype, compiled=options.device == "cuda"))
    try:
        findings.start_s = round(time.monotonic() - began, 2)
        if (proof := engine.start_proof) is not None:
            findings.proof, findings.proof_s = str(proof), round(proof.seconds, 2)
        report()
        answers, room = list[Answer](), asyncio.Semaphore(AT_ONCE)

        async def ask(number: int, asked: Asked) -> None:
            async with room:
                try:
                    generation = await collect(engine.submit(asked.request))
                    answers.append(Answer(number=number, asked=asked, generation=generation))
                except SteerError as error:
                    findings.failures.append(f"request {number} ({asked.kind}): {error}")
            findings.requests += 1

        async with asyncio.TaskGroup() as group:
            for number, asked in enumerate(requests_for(options.requests, engine.info)):
                group.create_task(ask(number, asked))
        return sorted(answers, key=lambda answer: answer.number)
    finally:
        await engine.close()


if __name__ == "__main__":
    sys.exit(main())
