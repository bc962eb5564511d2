"""The flags of SamplingOptions, one for each of its fields, and the options that they give."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from steer_service.core.errors import InvalidRequest, SteerError, within
from steer_service.core.json_fields import json_object
from steer_service.core.number_limits import MAX_INT
from steer_service.core.sampling_options import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE, SamplingOptions
from steer_service.core.structured_outputs import StructuredOutputs


class FlagError(Exception):
    """The value of a flag is wrong; the message describes the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlag:
    """The flag of one field."""

    help: str
    """What it does; a default is the server's."""
    servers_default: float | None = None
    """The default that a server usually has; None: there is none, or `help` has it."""
    kind: type[Any] = str
    """int, float, or bool for a flag with a --no- form. str for a value that `read` reads."""
    metavar: str | None = None
    """What its value is."""
    is_repeated: bool = False
    """True: each use adds a value."""
    read: Callable[[str], Any] | None = None
    """The value of a text; raises FlagError or InvalidRequest."""


def _token_ids_from(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise FlagError(f"{text!r} is not a list of token ids such as 17,42") from None


def _biases_from(text: str) -> dict[int, float]:
    biases: dict[int, float] = {}
    for part in text.split(","):
        token, _, bias = part.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise FlagError(f"{part!r} is not a token id and its bias, such as 17=-5.5") from None
    return biases


def _constraint_from(text: str) -> StructuredOutputs:
    with within("structured_outputs"):
        return StructuredOutputs.of(json_object(text, "", MAX_INT))


SAMPLING: Mapping[str, SamplingFlag] = {
    "n": SamplingFlag(kind=int, metavar="N", help="outputs of the prompt, each printed under a heading (default: 1)"),
    "max_tokens": SamplingFlag(
        kind=int, metavar="N", help="most tokens to generate", servers_default=DEFAULT_MAX_TOKENS
    ),
    "min_tokens": SamplingFlag(kind=int, metavar="N", help="ignore the end of the text before this many tokens"),
    "temperature": SamplingFlag(kind=float, metavar="T", help="0 is greedy", servers_default=DEFAULT_TEMPERATURE),
    "top_p": SamplingFlag(kind=float, metavar="P", help="sample from the likeliest tokens that reach this probability"),
    "top_k": SamplingFlag(kind=int, metavar="K", help="sample from the K likeliest tokens; 0: from all"),
    "min_p": SamplingFlag(kind=float, metavar="P", help="least probability, relative to that of the likeliest token"),
    "seed": SamplingFlag(kind=int, metavar="N", help="seed that makes sampling repeatable"),
    "presence_penalty": SamplingFlag(kind=float, metavar="X", help="against tokens that were generated, -2 to 2"),
    "frequency_penalty": SamplingFlag(kind=float, metavar="X", help="the same, for each time, -2 to 2"),
    "repetition_penalty": SamplingFlag(
        kind=float, metavar="X", help="against tokens of prompt and output: above 0, at most 2; 1: none"
    ),
    "ignore_eos": SamplingFlag(kind=bool, help="continue after the end-of-sequence token"),
    "skip_special_tokens": SamplingFlag(kind=bool, help="leave special tokens out of the text"),
    "logprobs": SamplingFlag(
        kind=int, metavar="K", help="log-probabilities of generated tokens and of the K likeliest; needs --json"
    ),
    "prompt_logprobs": SamplingFlag(
        kind=int, metavar="K", help="log-probabilities of the prompt's tokens and of the K likeliest; needs --json"
    ),
    "stop": SamplingFlag(
        metavar="TEXT", is_repeated=True, help="a text that ends the output; may be repeated; $'\\n' is a line end"
    ),
    "stop_token_ids": SamplingFlag(metavar="IDS", read=_token_ids_from, help="tokens that end the output, as 17,42"),
    "include_stop": SamplingFlag(kind=bool, help="keep the stop text in the output"),
    "logit_bias": SamplingFlag(
        metavar="ID=BIAS", read=_biases_from, help="numbers added to the logits of tokens, as 17=-5.5,42=3"
    ),
    "bad_words": SamplingFlag(metavar="WORD", is_repeated=True, help="a word not to generate; may be repeated"),
    "allowed_token_ids": SamplingFlag(
        metavar="IDS", read=_token_ids_from, help="the only tokens to generate, such as 17,42"
    ),
    "structured_outputs": SamplingFlag(
        metavar="JSON",
        read=_constraint_from,
        help='what the text must be like: {"json": SCHEMA}, {"regex": ...}, {"grammar": ...} or {"choice": [...]}',
    ),
}
"""Field of SamplingOptions -> its flag."""

NO_DEFAULTS: Mapping[str, float] = {}
"""Every default is the server's."""


def flag_of(field: str) -> str:
    """The flag of a field."""
    return "--" + field.replace("_", "-")


def add_sampling_arguments(
    parser: argparse.ArgumentParser, fields: Iterable[str] = SAMPLING, defaults: Mapping[str, float] = NO_DEFAULTS
) -> None:
    """Adds the flags of these fields; without a flag, the value is that of `defaults`, or the server decides."""
    group = parser.add_argument_group("sampling")
    for field in fields:
        flag = SAMPLING[field]
        if flag.kind is bool:
            group.add_argument(flag_of(field), action=argparse.BooleanOptionalAction, help=flag.help)
        elif flag.is_repeated:
            group.add_argument(flag_of(field), metavar=flag.metavar, action="append", default=[], help=flag.help)
        else:
            group.add_argument(
                flag_of(field),
                metavar=flag.metavar,
                type=flag.kind,
                default=defaults.get(field),
                help=flag.help + _default_text(flag, defaults.get(field)),
            )


def _default_text(flag: SamplingFlag, own: float | None) -> str:
    if own is not None:
        return f" (default: {own:g})"
    return "" if flag.servers_default is None else f" (default: the server's, usually {flag.servers_default:g})"


def sampling_of(namespace: argparse.Namespace, fields: Iterable[str] = SAMPLING) -> SamplingOptions:
    """The options that the flags of these fields give.

    Raises FlagError, or InvalidRequest whose field begins with the flag.
    """
    given: dict[str, Any] = {}
    with naming_flags():
        for field in fields:
            value, read = getattr(namespace, field), SAMPLING[field].read
            if value is None or value == []:
                continue
            try:
                given[field] = value if read is None else read(value)
            except FlagError as error:
                raise FlagError(f"{flag_of(field)}: {error}") from None
        return SamplingOptions(**given)


@contextmanager
def naming_flags(*others: str) -> Iterator[None]:
    """Errors of the block whose field is a sampling option, or one of `others`, name the flag instead."""
    try:
        yield
    except SteerError as error:
        field = error.field.removeprefix("sampling.")
        name = next((known for known in (*SAMPLING, *others) if _begins_with(field, known)), None)
        if name is not None and isinstance(error, InvalidRequest):
            error.field = flag_of(name) + field[len(name) :]
        raise


def _begins_with(field: str, name: str) -> bool:
    return field == name or field.startswith((name + ".", name + "["))
