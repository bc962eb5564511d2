"""Checks of single fields, for every type that users construct."""

import operator
import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np

from steer_service.core.errors import InvalidRequest
from steer_service.core.number_limits import (
    MAX_IDENTIFIER_LENGTH,
    MAX_MESSAGES,
    MAX_NAME_LENGTH,
    MAX_NAMED_MESSAGES,
    MAX_NAMED_ROLES,
    MAX_ROLE_LENGTH,
)

MAX_TOKEN_ID = 2**31 - 1

MAX_LAYER_INDEX = 2**31 - 1
"""The highest layer that can be written on the wire."""

MAX_TIMEOUT_S = 1e9
"""Seconds of a timeout at most: gRPC takes longer ones for times that are over."""

IDENTIFIER = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_IDENTIFIER_LENGTH}}}")
"""A request id or a client id."""


def is_number(value: Any) -> bool:
    """True for Python's and NumPy's numbers; False for booleans."""
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """True for Python's and NumPy's integers; False for booleans."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_layer(layer: Any, last: int = MAX_LAYER_INDEX) -> None:
    """Raises InvalidRequest, without a field, for what is not a layer index in 0..`last`."""
    if not is_integer(layer):
        raise InvalidRequest(f"layer {layer!r} is not an integer", reason="BAD_LAYER")
    if layer < 0:
        raise negative_layer(int(layer), None if last == MAX_LAYER_INDEX else last + 1)
    if layer > last:
        raise InvalidRequest(f"layer {layer} is outside 0..{last}", reason="UNKNOWN_LAYER")


def negative_layer(layer: int, layer_count: int | None) -> InvalidRequest:
    """The error for a layer below 0; it says what was meant, in numbers if `layer_count` of the model is known."""
    if layer_count is None:
        meant = f"counted from the end it is layer_count - {-layer}, and `model.layer_count` has the number"
    elif -layer <= layer_count:
        meant = f"this model has {layer_count}, so {layer} would be {layer_count + layer}"
    else:
        meant = f"this model has {layer_count}, 0..{layer_count - 1}"
    return InvalidRequest(f"layer {layer} is negative; layers count from 0: {meant}", reason="UNKNOWN_LAYER")


def check_token_ids(values: Any, name: str) -> tuple[int, ...]:
    """`values` as a tuple of integers; raises InvalidRequest for anything else, with `name` as its field."""
    if isinstance(values, (str, bytes)):  # bytes would pass as small integers
        raise InvalidRequest(f"token ids are integers, got {type(values).__name__}", reason="BAD_TOKEN", field=name)
    try:
        tokens = tuple(map(operator.index, values))
    except TypeError as error:
        raise InvalidRequest(f"token ids are integers: {error}", reason="BAD_TOKEN", field=name) from error
    if tokens and min(tokens) < 0:
        raise InvalidRequest(f"token id {min(tokens)} is negative", reason="BAD_TOKEN", field=name)
    if tokens and max(tokens) > MAX_TOKEN_ID:
        raise InvalidRequest(f"a token id is above {MAX_TOKEN_ID}", reason="BAD_TOKEN", field=name)
    return tokens


def check_text(value: Any, name: str) -> None:
    """Raises InvalidRequest, with `name` as its field, for what is not text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidRequest(f"expected text, got {type(value).__name__}", reason="BAD_TEXT", field=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the character at {error.start} is half of a surrogate pair", reason="BAD_TEXT", field=name
        ) from None


def check_length(entries: Sized, most: int, what: str, name: str) -> None:
    """Raises InvalidRequest (TOO_MANY_ENTRIES), with `name` as its field, for more than `most` entries."""
    if len(entries) > most:
        raise InvalidRequest(f"{len(entries)} {what}, at most {most}", reason="TOO_MANY_ENTRIES", field=name)


def check_name(value: Any, name: str) -> None:
    """Raises InvalidRequest, with `name` as its field, for what is not text of at most 256 characters."""
    check_text(value, name)
    if len(value) > MAX_NAME_LENGTH:
        raise InvalidRequest(f"{name} has more than {MAX_NAME_LENGTH} characters", field=name)


def check_identifier(value: str, name: str, *, reason: str | None = None) -> None:
    """Raises InvalidRequest, with `name` as its field, for what is not 1..128 characters of `A-Z a-z 0-9 . _ : -`."""
    if not IDENTIFIER.fullmatch(value):  # the value may be a secret: the message does not show it
        raise InvalidRequest(f"{name} must be 1..128 characters of A-Z a-z 0-9 . _ : -", reason=reason, field=name)


def check_timeout(seconds: Any, name: str) -> None:
    """Raises InvalidRequest, with `name` as its field, for what is not a number above 0 and at most 10^9."""
    if not (is_number(seconds) and 0 < seconds <= MAX_TIMEOUT_S):  # also refuses NaN
        raise InvalidRequest(
            f"{seconds!r} is not above 0 and at most {MAX_TIMEOUT_S:.0f} seconds; None sets no limit",
            reason="OUT_OF_RANGE",
            field=name,
        )


def check_kind(value: Any, kinds: type | tuple[type, ...], name: str) -> None:
    """Raises InvalidRequest, with `name` as its field, for a value of another class."""
    if not isinstance(value, kinds):
        expected = kinds if isinstance(kinds, tuple) else (kinds,)
        known = " or ".join(kind.__name__ for kind in expected if kind is not type(None))
        raise InvalidRequest(f"expected {known}, got {type(value).__name__}", field=name)


def named_messages(value: Any) -> tuple[int, ...]:
    """`value` as numbers of messages, negative ones from the end; raises InvalidRequest (`messages`)."""
    items = _items(value, "messages", MAX_NAMED_MESSAGES)
    for index, item in enumerate(items):
        if not is_integer(item) or not -MAX_MESSAGES <= item < MAX_MESSAGES:
            raise InvalidRequest(
                f"{item!r} is not a whole number in -{MAX_MESSAGES}..{MAX_MESSAGES - 1}",
                reason="OUT_OF_RANGE",
                field=f"messages[{index}]",
            )
    return tuple(map(int, items))


def named_roles(value: Any) -> tuple[str, ...]:
    """`value` as roles of messages; raises InvalidRequest (`roles`)."""
    items = _items(value, "roles", MAX_NAMED_ROLES)
    for index, item in enumerate(items):
        check_text(item, f"roles[{index}]")
        if not 1 <= len(item) <= MAX_ROLE_LENGTH:
            raise InvalidRequest(
                f"a role has {len(item)} characters, expected 1..{MAX_ROLE_LENGTH}", field=f"roles[{index}]"
            )
    return items


def _items(value: Any, name: str, most: int) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{type(value).__name__} is not a sequence", field=name)
    items = tuple(value)
    check_length(items, most, "entries", name)
    return items
