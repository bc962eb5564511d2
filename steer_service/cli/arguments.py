"""What commands share: the options of a request, how their values are parsed, and how errors are printed."""

import argparse
import re
import sys
from collections.abc import Iterable

from steer_client import SteerClient
from steer_client.channel import ClientOptions
from steer_service.cli.connection import Connection, add_connection_arguments
from steer_service.cli.sampling_arguments import FlagError, add_sampling_arguments
from steer_service.cli.terminal import shown
from steer_service.core.capture import CaptureSite, CaptureSpec, Pooling
from steer_service.core.errors import SteerError, within
from steer_service.core.field_checks import negative_layer
from steer_service.core.positions import NOT_SPECIAL, PositionRange, PositionScope, scope_from
from steer_service.core.sampling_options import DEFAULT_TEMPERATURE

POSITIONS = """\
Positions select tokens of the sequence: `prompt`, `generated`, a position, or a range such as 4..9, ..9 or 4..;
several are separated by commas. A range includes both ends. The first prompt token has position 0. Negative numbers
count from the end of the prompt, whose last token is -1: --positions=-4..-1. A slice selects generated tokens, without
its end, as in Python: generated[0:8] are the first eight.

In a chat, messages[0] selects the text of the first message, and messages[-1] that of the last one. The texts of all
messages of a role are roles[user]. Special tokens of the prompt, such as BOS, are left out by skip_special_tokens.
Alone, it selects all other positions.
"""
"""The help on positions."""

_NEGATIVE = re.compile(r"-\d+", re.ASCII)

_POSITION = re.compile(r"-?\d+|(?:-?\d+)?\.\.(?:-?\d+)?", re.ASCII)


CAPTURE_SAMPLING = ("max_tokens", "temperature", "seed")
"""The sampling options of `steer capture`, which is about prompts."""


class UsageError(FlagError):
    """The command line is wrong; the message describes the error."""


def add_truncation_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that cuts long prompts."""
    parser.add_argument(
        "--truncate-prompt-tokens",
        metavar="K",
        type=int,
        help="keep only the last K tokens of a longer prompt; -1: as many as the model takes",
    )


def add_request_arguments(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """Adds the server, the model, the sampling options and the priority.

    `max_tokens` is the default of the flags `CAPTURE_SAMPLING`; None adds all flags, whose defaults are the server's.
    """
    add_connection_arguments(parser)
    parser.add_argument(
        "--model", metavar="NAME", default="", help="the served model or one of its adapters (default: the model)"
    )
    add_truncation_argument(parser)
    if max_tokens is None:
        add_sampling_arguments(parser)
    else:
        defaults = {"max_tokens": max_tokens, "temperature": DEFAULT_TEMPERATURE}
        add_sampling_arguments(parser, CAPTURE_SAMPLING, defaults)
    parser.add_argument(
        "--priority", metavar="N", type=int, help="of waiting requests, those with lower ones run first"
    )


def capture_of(
    layers: tuple[int, ...],
    option: str,
    positions: str | None,
    *,
    site: str | None,
    dtype: str | None,
    pooling: str | None,
) -> CaptureSpec:
    """What to capture, at the positions that `option` gives; raises UsageError or InvalidRequest."""
    with within("capture.positions"):
        scope = None if positions is None else positions_from(option, positions)
    with within("capture"):
        return CaptureSpec(
            layers=layers,
            site=CaptureSite(site or "after"),
            positions=scope,
            dtype=dtype,
            pooling=Pooling(pooling or "none"),
        )


def layers_from(option: str, argument: str, connection: Connection | None = None) -> tuple[int, ...]:
    """The layers in `argument`, numbers and ranges such as `3,7-9`.

    The server of `connection` is asked for its number of layers if one of them is negative, for the message.
    """
    layers: list[int] = []
    for part in argument.split(","):
        if _NEGATIVE.fullmatch(part.strip()):
            raise UsageError(f"{option}: {negative_layer(int(part), _layer_count_of(connection))}")
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"{option}: {part!r} is not a layer or a range such as 7-9")
        end = int(last) if dash else int(first)
        if not int(first) <= end <= int(first) + 10_000:  # a typing error must not fill the memory
            raise UsageError(f"{option}: {part!r} is not a range of layers")
        layers.extend(range(int(first), end + 1))
    return tuple(layers)


def layers_text(layers: Iterable[int]) -> str:
    """Different ascending layers as `layers_from` takes them: 3,7-9."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _layer_count_of(connection: Connection | None) -> int | None:
    """The number of layers of the server's model; None if no server answers."""
    if connection is None:
        return None
    options: ClientOptions = {**connection.options, "unary_timeout_s": 2.0}
    try:
        with SteerClient(connection.address, **options) as client:
            return client.layer_count
    except SteerError:
        return None


def positions_from(option: str, argument: str) -> PositionScope:
    """The positions in `argument`, words, numbers and ranges such as `prompt,-1,20..29`."""
    items: list[str | PositionRange] = []
    for part in map(str.strip, argument.split(",")):
        first, dots, last = part.partition("..")
        if part.startswith(("prompt", "generated", "messages[", "roles[", NOT_SPECIAL)):
            items.append(part)
        elif not _POSITION.fullmatch(part):
            raise UsageError(
                f"{option}: {part!r} is not prompt, generated, a position, 4..9, generated[0:8], messages[-1], "
                f"roles[user] or {NOT_SPECIAL}"
            )
        else:
            items.append(PositionRange(int(first or 0), int(last) if last else None if dots else int(first)))
    scope = scope_from(items)
    assert scope is not None, "there is at least one item"
    return scope


NOTHING_LISTENS = ("the connection is refused", "there is no such socket")
"""What the client says where there is no server at all."""

ADVICE_AS_FLAGS = (
    ("pass its authority as tls_credentials(ca=...)", "give its authority as --tls-ca FILE"),
    ("if it has TLS, pass credentials=tls_credentials()", "if it has TLS, give --tls-ca FILE or --tls"),
    ("pass token=...", "give --token-file FILE"),
    ("set truncate_prompt_tokens", "give --truncate-prompt-tokens -1"),
    ("leave out `credentials`", "leave out --tls and --tls-ca"),
    ("tls_credentials(cert=..., key=...)", "--tls-cert and --tls-key"),
)
"""Advice of the client for Python -> the same for the command line."""


def format_error(error: SteerError) -> str:
    """The line that a command prints for an error."""
    message = error.message if error.reason == "UNREACHABLE" else str(error)
    for advice, flags in ADVICE_AS_FLAGS:
        message = message.replace(advice, flags)
    if error.reason == "UNREACHABLE" and message.endswith(NOTHING_LISTENS):
        return f"steer: {message}; `steer serve` starts one."
    return f"steer: {message}"


def print_error(line: str, status: int) -> int:
    """Prints `line` on standard error and returns `status`, with which the command ends."""
    print(shown(line, sys.stderr), file=sys.stderr)
    return status
