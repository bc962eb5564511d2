"""`steer generate PROMPT`: text from a running server on the terminal, steered and captured if asked."""

import argparse
import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_client import AsyncSteerClient
from steer_client.channel import DEFAULT_ADDRESS
from steer_service.core.arrays import DTYPES, name_of_dtype
from steer_service.core.calls import Generation, checked_events, collect
from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.errors import SteerError, within
from steer_service.core.positions import PositionRange, PositionScope, positions_of, scope_from
from steer_service.core.request import (
    ChatMessage,
    ChatPrompt,
    Event,
    GenerateRequest,
    Prompt,
    SamplingOptions,
    TextPrompt,
    TokenDelta,
)
from steer_service.core.sampling import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE
from steer_service.core.spec_json import spec_from_text
from steer_service.core.specs import SteeringSpec
from steer_service.server.exit_status import BAD_USAGE, FAILED, INTERRUPTED

DESCRIPTION = """\
Generates from PROMPT with a running server and prints the text as it arrives.

--steering takes a JSON document, or the name of a file that holds one:

  {"layers": {"5": [{"op": "add", "vector": [0.1, ...], "scale": 2.0},
                    {"op": "cap", "vector": {"file": "direction.npy"}, "min": -1.0, "max": 1.0}],
              "10": [{"op": "ablation", "vector": {"file": "direction.npy"}, "scale": 0.0}]}}

Layers count from 0 and their operations run in order. A vector is a list of numbers or a .npy file, relative to the
document's folder. scale, min and max may be left out. The document may hold "positions" as well.

Positions choose rows, which are tokens fed to the model: `prompt`, `generated`, a position, a range with both ends
included such as 4..9, ..9 or 4.., or several with commas between. The first prompt token has position 0; negative
numbers count from the prompt's end, whose last token is -1: --positions=-4..-1

--capture writes a .npz with an array `layer_N` of shape [rows, width] for each layer, after steering or, if only that
was asked for, before it; with --capture-site both, `layer_N_before` besides. `positions`, `token_ids`, `is_generated`
and `is_steered` say what each row is, and `dtype` is the element type's name. NumPy has no bfloat16: such layers are
stored as uint16, and `array.view(ml_dtypes.bfloat16)` or `torch.from_numpy(array).view(torch.bfloat16)` reads them.
"""


_POSITION = re.compile(r"-?\d+|(?:-?\d+)?\.\.(?:-?\d+)?", re.ASCII)


class UsageError(Exception):
    """The command line is wrong; the message says how."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `steer generate` takes to `parser`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from")
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port or unix:/path (default: %(default)s)")
    parser.add_argument(
        "--chat", action="store_true", help="send PROMPT as a user's message, through the chat template"
    )
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=DEFAULT_TEMPERATURE, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--steering", metavar="FILE|JSON", help="what to do to the residual stream")
    parser.add_argument("--positions", metavar="POSITIONS", help="the rows to steer (default: all)")
    parser.add_argument("--capture", metavar="LAYERS", help="layers to capture, such as 3,7-9; needs --out")
    parser.add_argument("--capture-positions", metavar="POSITIONS", help="the rows to capture (default: all)")
    parser.add_argument(
        "--capture-site",
        choices=[site.value for site in CaptureSite],
        help="capture after steering, before it, or both (default: after)",
    )
    parser.add_argument("--capture-dtype", metavar="DTYPE", help="float32, or the model's own (default: the model's)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where captures go, a .npz file")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: text, finish_reason, receipt, usage"
    )


def run(namespace: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit status."""
    try:
        request = request_from(namespace)
        client = AsyncSteerClient(namespace.address)
    except (UsageError, SteerError) as error:
        return _complain(f"steer: {error}", BAD_USAGE)
    try:
        generation = asyncio.run(_generate(client, request, quiet=namespace.json))
        _report(generation, namespace)
    except SteerError as error:
        return _complain(_sentence(error), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails again
        return FAILED
    except OSError as error:
        return _complain(f"steer: --out: {error.strerror or error}", FAILED)
    return 0


def request_from(namespace: argparse.Namespace) -> GenerateRequest:
    """The request that the command line describes; raises UsageError or InvalidRequest."""
    if (namespace.capture is None) != (namespace.out is None):
        raise UsageError("--capture and --out go together")
    if namespace.out is not None:
        _check_out(namespace.out)
    return GenerateRequest(
        prompt=_prompt_from(namespace.prompt, namespace.chat),
        sampling=SamplingOptions(
            max_tokens=namespace.max_tokens, temperature=namespace.temperature, seed=namespace.seed
        ),
        steering=_steering_of(namespace),
        capture=_capture_of(namespace),
    )


def _steering_of(namespace: argparse.Namespace) -> SteeringSpec | None:
    if namespace.steering is None:
        if namespace.positions is not None:
            raise UsageError("--positions needs --steering")
        return None
    spec = steering_from(namespace.steering)
    if namespace.positions is None:
        return spec
    if spec.positions is not None:
        raise UsageError("--positions: the steering document has positions already")
    with within("steering.positions"):
        return replace(spec, positions=positions_from("--positions", namespace.positions))


def _capture_of(namespace: argparse.Namespace) -> CaptureSpec | None:
    if namespace.capture is None:
        for name in ("capture_positions", "capture_site", "capture_dtype"):
            if getattr(namespace, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --capture")
        return None
    positions = namespace.capture_positions
    with within("capture.positions"):
        scope = None if positions is None else positions_from("--capture-positions", positions)
    with within("capture"):
        return CaptureSpec(
            layers=layers_from(namespace.capture),
            site=CaptureSite(namespace.capture_site or "after"),
            positions=scope,
            dtype=namespace.capture_dtype,
        )


def steering_from(argument: str) -> SteeringSpec:
    """The spec in `argument`, a JSON object or the name of a file with one."""
    if argument.lstrip().startswith("{"):
        return spec_from_text(argument)
    try:
        text = Path(argument).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--steering: {argument} is neither a JSON object nor a readable file") from error
    return spec_from_text(text, Path(argument).parent)


def layers_from(argument: str) -> tuple[int, ...]:
    """The layers in `argument`, numbers and ranges such as `3,7-9`."""
    layers: list[int] = []
    for part in argument.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--capture: {part!r} is not a layer or a range such as 7-9")
        end = int(last) if dash else int(first)
        if not int(first) <= end <= int(first) + 10_000:  # a typing slip must not fill the memory
            raise UsageError(f"--capture: {part!r} is not a range of layers")
        layers.extend(range(int(first), end + 1))
    return tuple(layers)


def positions_from(option: str, argument: str) -> PositionScope:
    """The positions in `argument`, words, numbers and ranges such as `prompt,-1,20..29`."""
    items: list[str | PositionRange] = []
    for part in map(str.strip, argument.split(",")):
        first, dots, last = part.partition("..")
        if part in ("prompt", "generated"):
            items.append(part)
        elif not _POSITION.fullmatch(part):
            raise UsageError(f"{option}: {part!r} is not prompt, generated, a position or a range such as 4..9")
        else:
            items.append(PositionRange(int(first or 0), int(last) if last else None if dots else int(first)))
    scope = scope_from(items)
    assert scope is not None, "there is at least one item"
    return scope


def save_captures(path: Path, generation: Generation) -> None:
    """Writes the captures of the first output to `path` as `DESCRIPTION` says."""
    output = generation.outputs[0]
    captured, positions = output.captured, positions_of(output.captured.spans)
    arrays: dict[str, npt.NDArray[Any]] = {
        "positions": positions,
        "token_ids": np.array([*generation.prompt_token_ids, *output.token_ids], dtype=np.int64)[positions],
        "is_generated": positions >= len(generation.prompt_token_ids),
    }
    if captured.labels is not None:
        arrays["is_steered"] = captured.labels.is_steered
    for layer, hidden in captured.hidden.items():
        arrays["dtype"] = np.array(name_of_dtype(hidden.dtype))
        arrays[f"layer_{layer}"] = _storable(hidden)
    for layer, hidden in captured.before.items() if captured.after else ():
        arrays[f"layer_{layer}_before"] = _storable(hidden)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes one of the names for `allow_pickle`


def _storable(hidden: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return hidden.view(np.uint16) if hidden.dtype == DTYPES["bfloat16"] else hidden


def _check_out(path: Path) -> None:
    if path.suffix != ".npz":
        raise UsageError(f"--out: {path} does not end in .npz")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--out: {path.parent} is not a folder")


def _prompt_from(text: str, chat: bool) -> Prompt:
    if chat:
        return ChatPrompt(messages=(ChatMessage(role="user", content=text),))
    with within("prompt"):
        return TextPrompt(text=text)


async def _generate(client: AsyncSteerClient, request: GenerateRequest, quiet: bool) -> Generation:
    async with client:
        events = checked_events(client, request)
        return await collect(events if quiet else _printed(events))


async def _printed(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TokenDelta):
                print(event.text, end="", flush=True)
            yield event


def _report(generation: Generation, namespace: argparse.Namespace) -> None:
    output = generation.outputs[0]
    if namespace.out is not None:
        save_captures(namespace.out, generation)
    if namespace.json:
        print(json.dumps(_as_json(generation)), flush=True)
    elif not output.text.endswith("\n"):
        print(flush=True)


def _as_json(generation: Generation) -> dict[str, Any]:
    output = generation.outputs[0]
    return {
        "text": output.text,
        "finish_reason": output.finish_reason.value,
        "receipt": asdict(output.receipt),
        "usage": asdict(generation.usage),
    }


def _sentence(error: SteerError) -> str:
    if error.reason == "UNREACHABLE":
        return f"steer: {error.message}; `steer serve` starts one."
    return f"steer: {error}"


def _complain(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status
