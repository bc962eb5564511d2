"""`steer generate PROMPT`: prints text from a running server, steered and captured on request."""

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_client import AsyncSteerClient
from steer_service.cli.arguments import (
    POSITIONS,
    UsageError,
    add_request_arguments,
    capture_of,
    layers_from,
)
from steer_service.cli.connection import Connection, connection_from
from steer_service.cli.prompt_arguments import add_prompt_arguments, prompt_of
from steer_service.cli.run_command import run_command
from steer_service.cli.sampling_arguments import naming_flags, sampling_of
from steer_service.cli.steering_argument import add_steering_arguments, steering_of
from steer_service.cli.terminal import print_text
from steer_service.core.arrays import name_of_dtype
from steer_service.core.capture import CaptureSite, CaptureSpec, Pooling
from steer_service.core.events import Event, TokenDelta, TokenLogprob
from steer_service.core.field_checks import check_timeout
from steer_service.core.request import GenerateRequest
from steer_service.core.spans import positions_of
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, Output, collect

DESCRIPTION = f"""\
Generates from PROMPT with a running server and prints the text as it arrives.

--steering takes trained steering (a folder of `steer train`), a file of vectors that `steer vectors inspect` reads, a
JSON document, or the name of a file with one:

  {{"layers": {{"5": [{{"op": "add", "vector": [0.1, ...], "scale": 2.0}},
                    {{"op": "cap", "vector": {{"file": "direction.npy"}}, "min": -1.0, "max": 1.0}}],
              "10": [{{"op": "ablation", "vector": {{"file": "direction.npy"}}, "scale": 0.0}}]}}}}

Layers count from 0 and their operations run in order. A vector is a list of numbers or a .npy file, relative to the
document's folder. scale, min and max are optional. The document may have "positions", the steered positions, as words,
numbers and {{"first": 4, "last": 9}}. An operation may have "positions" of its own, "max_relative_change" and
"keep_norm", and an addition "scaling": "relative". "report_change": true is --report-change. In place of its
operations, a layer may have {{"hook": "residual_stream", "operations": [...]}}.

{POSITIONS}
--capture writes a .npz file. It has an array `layer_N` of shape [rows, hidden_size] for each layer: the residual stream
after steering, or before it with --capture-site before. With --capture-site both, `layer_N_before` is added.
`positions`, `token_ids`, `is_generated` and `is_steered` describe each row. The rows are float32, which is exact;
`dtype` is the name of the dtype in which they were captured. With --capture-pooling, `layer_N` has one row, made of
those at `positions`, and there is no `is_steered`.
"""

LOGPROBS = ("logprobs", "prompt_logprobs")
"""Options of SamplingOptions whose results --json prints."""

FIELDS = ("truncate_prompt_tokens", "time_budget", "priority", "stream_interval", "timeout")
"""Further fields of a request that have a flag of their name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer generate`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_prompt_arguments(parser, "the text to continue")
    add_request_arguments(parser, max_tokens=None)
    add_steering_arguments(parser)
    parser.add_argument(
        "--time-budget", metavar="S", type=float, help="end after this many seconds and keep what was generated"
    )
    parser.add_argument("--timeout", metavar="S", type=float, help="fail after this many seconds (default: no limit)")
    parser.add_argument(
        "--stream-interval", metavar="N", type=int, help="print the text in pieces of at least N tokens; 0: at its end"
    )
    parser.add_argument("--capture", metavar="LAYERS", help="layers to capture, such as 3,7-9; needs --out")
    parser.add_argument("--capture-positions", metavar="POSITIONS", help="positions to capture (default: all)")
    parser.add_argument(
        "--capture-site",
        choices=[site.value for site in CaptureSite],
        help="capture after steering, before it, or both (default: after)",
    )
    parser.add_argument("--capture-dtype", metavar="DTYPE", help="float32, or the model's own (default: the model's)")
    parser.add_argument(
        "--capture-pooling",
        choices=[pooling.value for pooling in Pooling],
        help="capture one row: the mean, the last or the largest values of the rows (default: none)",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="the .npz file to write captures to")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: outputs, each with text, finish_reason, receipt and log-probabilities; usage",
    )
    parser.add_argument(
        "--report-change",
        action="store_true",
        help="let the receipt say how much each layer changed its rows; needs --steering and --json",
    )


def run(namespace: argparse.Namespace) -> int:
    """Executes the command line and returns the exit status."""
    return run_command(partial(request_from, namespace), partial(_execute, namespace))


def _execute(namespace: argparse.Namespace, request: GenerateRequest) -> int:
    connection = connection_from(namespace)
    client = AsyncSteerClient(connection.address, **connection.options)
    quiet = namespace.json or request.sampling.n not in (None, 1)  # several outputs arrive mixed
    with naming_flags(*FIELDS):
        generation = asyncio.run(_generate(client, request, quiet, namespace.timeout))
    _report(generation, namespace)
    return 0


def request_from(namespace: argparse.Namespace) -> GenerateRequest:
    """The request that the command line describes; raises UsageError or InvalidRequest."""
    connection = connection_from(namespace)
    if (namespace.capture is None) != (namespace.out is None):
        raise UsageError("--capture and --out go together")
    if namespace.out is not None:
        _check_out(namespace.out)
    for name in LOGPROBS:
        if getattr(namespace, name) is not None and not namespace.json:
            raise UsageError(f"--{name.replace('_', '-')} needs --json")
    sampling = sampling_of(namespace)
    if namespace.capture is not None and sampling.n not in (None, 1):
        raise UsageError("--n: --capture writes the rows of one output")
    prompt, steering, capture = prompt_of(namespace), _steering_of(namespace), _capture_of(namespace, connection)
    with naming_flags(*FIELDS):
        if namespace.timeout is not None:
            check_timeout(namespace.timeout, "timeout")
        return GenerateRequest(
            prompt=prompt,
            model=namespace.model,
            truncate_prompt_tokens=namespace.truncate_prompt_tokens,
            sampling=sampling,
            steering=steering,
            capture=capture,
            time_budget_s=namespace.time_budget,
            priority=namespace.priority,
            stream_interval=namespace.stream_interval,
        )


def _steering_of(namespace: argparse.Namespace) -> SteeringSpec | None:
    spec = steering_of(namespace)
    if not namespace.report_change:
        return spec
    if spec is None or not namespace.json:
        raise UsageError("--report-change needs --steering and --json")
    return replace(spec, report_change=True)


def _capture_of(namespace: argparse.Namespace, connection: Connection) -> CaptureSpec | None:
    if namespace.capture is None:
        for name in ("capture_positions", "capture_site", "capture_dtype", "capture_pooling"):
            if getattr(namespace, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --capture")
        return None
    return capture_of(
        layers_from("--capture", namespace.capture, connection),
        "--capture-positions",
        namespace.capture_positions,
        site=namespace.capture_site,
        dtype=namespace.capture_dtype,
        pooling=namespace.capture_pooling,
    )


def save_captures(path: Path, generation: Generation) -> None:
    """Writes the captures of the first output to `path` as `DESCRIPTION` describes."""
    output = generation.outputs[0]
    captured, positions = output.captured.as_float32(), positions_of(output.captured.spans)
    arrays: dict[str, npt.NDArray[Any]] = {
        "positions": positions,
        "token_ids": np.array([*generation.prompt_token_ids, *output.token_ids], dtype=np.int64)[positions],
        "is_generated": positions >= len(generation.prompt_token_ids),
    }
    if captured.labels is not None:
        arrays["is_steered"] = captured.labels.is_steered
    for hidden in output.captured.hidden.values():
        arrays["dtype"] = np.array(name_of_dtype(hidden.dtype))
    arrays |= {f"layer_{layer}": hidden for layer, hidden in captured.hidden.items()}
    if captured.after:
        arrays |= {f"layer_{layer}_before": hidden for layer, hidden in captured.before.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes one of the names for `allow_pickle`


def _check_out(path: Path) -> None:
    if path.suffix != ".npz":
        raise UsageError(f"--out: {path} does not end in .npz")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--out: {path.parent} is not a folder")


async def _generate(
    client: AsyncSteerClient, request: GenerateRequest, quiet: bool, timeout_s: float | None
) -> Generation:
    async with client:
        events = checked_events(client, request, timeout_s=timeout_s)
        return await collect(events if quiet else _printed(events))


async def _printed(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TokenDelta):
                print_text(event.text, end="")
            yield event


def _report(generation: Generation, namespace: argparse.Namespace) -> None:
    if namespace.out is not None:
        save_captures(namespace.out, generation)
    if namespace.json:
        print(json.dumps(_as_json(generation)), flush=True)
    elif len(generation.outputs) > 1:
        print_text("\n\n".join(_headed(generation)))
    elif not generation.outputs[0].text.endswith("\n"):
        print(flush=True)


def _headed(generation: Generation) -> Iterator[str]:
    """Each output under its heading."""
    count = len(generation.outputs)
    for number, output in enumerate(generation.outputs, start=1):
        yield f"=== output {number} of {count} ===\n{output.text}"


def _as_json(generation: Generation) -> dict[str, Any]:
    outputs, prompt = [_output_as_json(output) for output in generation.outputs], generation.prompt_logprobs
    return {
        **outputs[0],
        "outputs": outputs,
        "usage": asdict(generation.usage),
        **({"prompt_logprobs": [one and _logprob_as_json(one) for one in prompt]} if prompt else {}),
    }


def _output_as_json(output: Output) -> dict[str, Any]:
    return {
        "text": output.text,
        "finish_reason": output.finish_reason.value,
        "receipt": asdict(output.receipt),
        **({"logprobs": [_logprob_as_json(one) for one in output.logprobs]} if output.logprobs else {}),
    }


def _logprob_as_json(entry: TokenLogprob) -> dict[str, Any]:
    return {**asdict(entry), "top": [top._asdict() for top in entry.top]}
