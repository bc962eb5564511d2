"""Checks the bytes of a request before they are parsed: which fields they have, and how many entries.

A message of 16 MiB can hold millions of entries. Parsing it takes seconds of the event loop and many times its own
memory. The scan reads the tags only, jumps over the contents and stops at the first field that is one too many. It
follows the contract: a field that the server does not know is refused here, where parsing would ignore it. Refusals
name fields as the checks after parsing do.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from steer_service.core.backend import ModelInfo
from steer_service.core.errors import InvalidRequest, SteerError, Unsupported
from steer_service.core.number_limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LAYERS,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_NAMED_MESSAGES,
    MAX_NAMED_ROLES,
    MAX_POSITION_ENTRIES,
    MAX_RANGES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOOL_CALLS_OF_CHAT,
    MAX_TOOLS,
)
from steer_service.wire.tensors import MAX_DIMENSIONS

M = TypeVar("M", bound=Message)

FieldLimits = Mapping[str, int]
"""Full name of a repeated field -> entries that one message may have at most."""

TOKEN_IDS = "steer.v1.TokenIds.ids"
TOKENS_TO_CONVERT = "steer.v1.DetokenizeRequest.token_ids"
LAYERS = "steer.v1.SteeringSpec.layers"
OPERATIONS = "steer.v1.LayerSteeringSpec.operations"
TOOL_CALLS = "steer.v1.ChatMessage.tool_calls"

COUNTED_TOGETHER = frozenset({OPERATIONS, TOOL_CALLS})
"""Fields whose limit is that of a whole request: of all layers, or of all messages of a chat."""

LIMITS: FieldLimits = {
    "steer.v1.CaptureSpec.layers": MAX_LAYERS,
    TOOL_CALLS: MAX_TOOL_CALLS_OF_CHAT,
    "steer.v1.ChatPrompt.messages": MAX_MESSAGES,
    "steer.v1.ChatPrompt.tools": MAX_TOOLS,
    "steer.v1.Choices.texts": MAX_CHOICES,
    "steer.v1.FetchCaptureRequest.layers": MAX_LAYERS,
    "steer.v1.PositionScope.generated_ranges": MAX_RANGES,
    "steer.v1.PositionScope.messages": MAX_NAMED_MESSAGES,
    "steer.v1.PositionScope.ranges": MAX_RANGES,
    "steer.v1.PositionScope.roles": MAX_NAMED_ROLES,
    "steer.v1.SamplingOptions.allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    "steer.v1.SamplingOptions.bad_words": MAX_BAD_WORDS,
    "steer.v1.SamplingOptions.logit_bias": MAX_LOGIT_BIAS,
    "steer.v1.SamplingOptions.stop": MAX_STOP_STRINGS,
    "steer.v1.SamplingOptions.stop_token_ids": MAX_STOP_TOKEN_IDS,
    "steer.v1.Tensor.shape": MAX_DIMENSIONS,
}
"""Limits that hold for every model; `model_limits` has the others."""

OF_POSITIONS = frozenset(
    f"steer.v1.PositionScope.{name}" for name in ("generated_ranges", "messages", "ranges", "roles")
)
"""Fields that may have MAX_POSITION_ENTRIES entries in the positions of all operations."""

MOST_OF_POSITIONS = MAX_POSITION_ENTRIES + 4 * MAX_RANGES
"""Entries of these fields in a whole request, since a capture has some of its own; parsing counts both exactly."""

OPERATIONS_TO_COUNT = 1024
"""Operations of one program up to which a refusal tells which limit of the model they exceed."""

_SHOWN = {
    "steer.v1.Choices.texts": "",
    "steer.v1.GenerateRequest.chat": "prompt",
    "steer.v1.GenerateRequest.text": "prompt.text",
    "steer.v1.GenerateRequest.token_ids": "prompt.token_ids",
    "steer.v1.RenderRequest.chat": "prompt",
    "steer.v1.RenderRequest.text": "prompt.text",
    "steer.v1.RenderRequest.token_ids": "prompt.token_ids",
    "steer.v1.SteeringOperation.ablation": "",
    "steer.v1.SteeringOperation.add": "",
    "steer.v1.SteeringOperation.projection_cap": "",
    "steer.v1.TokenIds.ids": "",
    "steer.v1.TokenizeRequest.text": "prompt.text",
    "steer.v1.Vector.inline": "",
}
"""Full name of a field -> its part of a path, where that is not its name. An empty part is left out."""

_MAX_VARINT_BYTES = 10

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types; groups (3 and 4) are in no message of the contract."""

_WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FIXED64: _FIXED64,
    FieldDescriptor.TYPE_SFIXED64: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_FIXED32: _FIXED32,
    FieldDescriptor.TYPE_SFIXED32: _FIXED32,
    FieldDescriptor.TYPE_STRING: _BYTES,
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_MESSAGE: _BYTES,
}
"""Types that are not written as varints."""

_LONG_BYTES = 8
"""Strings, bytes and numbers of at least this many bytes are contents, which may differ between equal messages."""


def model_limits(info: ModelInfo) -> FieldLimits:
    """The limits of the fields of requests to this model."""
    return {
        **LIMITS,
        TOKEN_IDS: info.max_model_len,
        TOKENS_TO_CONVERT: info.max_model_len,
        LAYERS: info.layer_count,
        OPERATIONS: max(OPERATIONS_TO_COUNT, info.max_operations),
    }


def parsed(kind: type[M], data: bytes) -> M:
    """`data`, which was scanned, as a message; raises InvalidRequest (MALFORMED)."""
    try:
        message: M = kind.FromString(data)
    except DecodeError as error:
        raise _malformed() from error
    return message


def scan(descriptor: Descriptor, data: bytes, limits: FieldLimits = LIMITS) -> dict[str, int]:
    """Checks the fields of a message; returns the bytes of each part at the top, by name.

    Raises InvalidRequest if a field has too many entries, is given twice or if the bytes are not a message. Raises
    Unsupported (UNKNOWN_FIELD) for a field that is not in the contract.
    """
    running = _Scan(data, limits)
    running.message(_plan_of(descriptor), 0, len(data), "", [])
    return running.lengths


@dataclass(frozen=True, slots=True, eq=False)
class _Field:
    """One field, as it is written with one wire type."""

    name: str
    full_name: str
    shown: str
    """Its part of a path."""
    is_repeated: bool
    is_packed: bool
    """The bytes hold many entries of `entry_type`."""
    entry_type: int
    """The wire type of one entry."""
    message: Descriptor | None
    """The type of its messages; None if its entries are not messages."""


Spans = list[tuple[int, int]]
"""First byte and end of parts of the request."""


@functools.cache
def _plan_of(descriptor: Descriptor) -> dict[int, _Field]:
    """Every tag that may stand in the message -> its field."""
    plan = {}
    for one in descriptor.fields:
        entry_type = _WIRE_TYPES.get(one.type, _VARINT)
        plan[one.number << 3 | entry_type] = _Field(
            name=one.name,
            full_name=one.full_name,
            shown=_SHOWN.get(one.full_name, one.name),
            is_repeated=one.is_repeated,
            is_packed=False,
            entry_type=entry_type,
            message=one.message_type,
        )
        if one.is_repeated and entry_type != _BYTES:
            plan[one.number << 3 | _BYTES] = replace(plan[one.number << 3 | entry_type], is_packed=True)
    return plan


class _Scan:
    """The scan of one request."""

    def __init__(self, data: bytes, limits: FieldLimits) -> None:
        self._data = data
        self._limits = limits
        self._like: dict[str, tuple[int, int, list[tuple[int, bytes]]]] = {}  # kind -> the message of it last scanned
        self._together: dict[str, int] = {}  # entries of the fields COUNTED_TOGETHER
        self._of_positions = 0  # entries of all fields OF_POSITIONS
        self.lengths: dict[str, int] = {}

    def message(self, plan: dict[int, _Field], start: int, end: int, path: str, contents: Spans) -> bool:
        """Checks the message in `start..end`; repeated messages in it are counted before any is looked at.

        Adds the long contents to `contents`: whatever they are, the message is right. Returns False if it cannot tell,
        since there are repeated messages in it.
        """
        data, position, counts = self._data, start, dict[str, int]()
        repeated: dict[str, tuple[_Field, Spans]] = {}
        is_flat = True
        while position < end:
            begin, tag = position, data[position]
            if tag < 128:
                position += 1
            else:
                tag, position = self._varint(position, end)
            known = plan.get(tag)
            if known is None:
                raise _unknown(tag, path)
            wire_type, first, count = tag & 7, position, 1
            if wire_type == _BYTES:
                if position < end and data[position] < 128:
                    position = first = position + 1
                    position += data[first - 1]
                else:
                    size, first = self._varint(position, end)
                    position = first + size
            elif wire_type == _VARINT:
                position = position + 1 if data[position : position + 1] < b"\x80" else self._varint(position, end)[1]
            else:
                position += 8 if wire_type == _FIXED64 else 4
            if position > end:
                raise _malformed()
            if known.is_packed:
                count = self._entries(known, first, position, path)
            elif known.message is None and wire_type != _VARINT and position - first >= _LONG_BYTES:
                contents.append((first, position))
            if known.message is not None and known.is_repeated:
                spans = repeated.setdefault(known.name, (known, []))[1]
                spans.append((first, position))
                header, size, most = data[begin:first], position - first, self._limits[known.full_name]
                # Operations are mostly equal in size, and tags are all that the scan may read of each.
                while len(spans) <= most and position < end and data.startswith(header, position):
                    spans.append((position + len(header), position + len(header) + size))
                    position += len(header) + size
                if position > end:
                    raise _malformed()
                count = len(spans) - counts.get(known.name, 0)
            entries = counts[known.name] = counts.get(known.name, 0) + count
            if known.full_name in COUNTED_TOGETHER:
                entries = self._together[known.full_name] = self._together.get(known.full_name, 0) + count
            most = self._limits[known.full_name] if known.is_repeated else 1
            if known.full_name in OF_POSITIONS:
                self._of_positions += count
                if self._of_positions > MOST_OF_POSITIONS:
                    entries, most = self._of_positions, MAX_POSITION_ENTRIES
            if entries > most:
                raise self._too_many(known, path, most)
            if known.message is not None and not known.is_repeated:
                is_flat &= self.message(_plan_of(known.message), first, position, _joined(path, known.shown), contents)
            if not path:
                self.lengths[known.name] = self.lengths.get(known.name, 0) + position - first
        for known, spans in repeated.values():
            assert known.message is not None
            self._messages(known.message, spans, _joined(path, known.shown))
        return is_flat and not repeated

    def _messages(self, kind: Descriptor, spans: Spans, path: str) -> None:
        """Checks messages of one kind. Those that differ from an earlier one in long contents only need no scan."""
        data, plan, is_map = self._data, _plan_of(kind), kind.GetOptions().map_entry
        size, positions, same = self._like.get(kind.full_name, (-1, 0, []))
        for index, (start, end) in enumerate(spans):
            if end - start == size and self._of_positions + positions <= MOST_OF_POSITIONS:
                for place, part in same:
                    if not data.startswith(part, start + place):
                        break
                else:
                    self._of_positions += positions
                    continue
            contents: Spans = []
            before = self._of_positions
            if self.message(plan, start, end, path if is_map else f"{path}[{index}]", contents):
                size, positions, same = end - start, self._of_positions - before, self._between(contents, start, end)
                self._like[kind.full_name] = size, positions, same

    def _between(self, contents: Spans, start: int, end: int) -> list[tuple[int, bytes]]:
        """What the message in `start..end` consists of besides `contents`: places after `start`, and bytes."""
        parts, since = [], start
        for first, last in [*contents, (end, end)]:
            parts.append((since - start, self._data[since:first]))
            since = last
        return [(place, part) for place, part in parts if part]

    def _entries(self, known: _Field, first: int, end: int, path: str) -> int:
        """The number of entries in packed bytes."""
        size = end - first
        if known.entry_type != _VARINT:
            return -(-size // (8 if known.entry_type == _FIXED64 else 4))
        if size > self._limits[known.full_name] * _MAX_VARINT_BYTES:
            raise self._too_many(known, path, self._limits[known.full_name])
        # The last byte of each varint is below 128.
        return int(np.count_nonzero(np.frombuffer(self._data, np.int8, size, first) >= 0))

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """The varint at `position`, and where it ends."""
        value = shift = 0
        for place in range(position, min(end, position + _MAX_VARINT_BYTES)):
            byte = self._data[place]
            value |= (byte & 127) << shift
            if byte < 128:
                return value, place + 1
            shift += 7
        raise _malformed()

    def _too_many(self, known: _Field, path: str, most: int) -> InvalidRequest:
        name = _joined(path, known.shown)
        if not known.is_repeated:
            return InvalidRequest("the field is given more than once", reason="DUPLICATE_FIELD", field=name)
        if known.full_name == TOKEN_IDS:
            return InvalidRequest(f"the prompt has more than {most} tokens", reason="PROMPT_TOO_LONG", field="prompt")
        reason = "PROGRAM_TOO_LARGE" if known.full_name == OPERATIONS else "TOO_MANY_ENTRIES"
        return InvalidRequest(f"more than {most} entries", reason=reason, field=name)


def _joined(path: str, part: str) -> str:
    return f"{path}.{part}" if path and part else path or part


def _unknown(tag: int, path: str) -> SteerError:
    number = tag >> 3
    if number == 0 or tag & 7 in (6, 7):
        return _malformed()
    return Unsupported(
        f"{path or 'the request'} has field number {number}, which is not known to this server",
        reason="UNKNOWN_FIELD",
        field=path,
    )


def _malformed() -> InvalidRequest:
    return InvalidRequest("the request is not a message of the contract", reason="MALFORMED")
