"""PositionScope and spans of positions <-> messages."""

from collections.abc import Iterable

from steer_service.core.errors import within_each
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.spans import OPEN_END, Span, Spans
from steer_service.wire import position_pb2


def scope_to_proto(scope: PositionScope | None) -> position_pb2.PositionScope | None:
    """`scope` as a message; None, which means all positions, stays None."""
    if scope is None:
        return None
    return position_pb2.PositionScope(
        prompt=scope.prompt,
        generated=scope.generated,
        ranges=_ranges_to_proto(scope.ranges),
        generated_ranges=_ranges_to_proto(scope.generated_ranges),
        messages=scope.messages,
        roles=scope.roles,
        skip_special_tokens=scope.skip_special_tokens,
    )


def scope_from_proto(message: position_pb2.PositionScope) -> PositionScope:
    """The scope in a message; raises InvalidRequest, with the path of the range, for a range that is not valid."""
    return PositionScope(
        prompt=message.prompt,
        generated=message.generated,
        ranges=_ranges_from_proto(message.ranges, "ranges"),
        generated_ranges=_ranges_from_proto(message.generated_ranges, "generated_ranges"),
        messages=tuple(message.messages),
        roles=tuple(message.roles),
        skip_special_tokens=message.skip_special_tokens,
    )


def _ranges_to_proto(ranges: Iterable[PositionRange]) -> list[position_pb2.PositionRange]:
    return [position_pb2.PositionRange(first=item.first, last=item.last) for item in ranges]


def _ranges_from_proto(messages: Iterable[position_pb2.PositionRange], name: str) -> tuple[PositionRange, ...]:
    with within_each(name, enumerate(messages)) as items:
        return tuple([PositionRange(item.first, item.last if item.HasField("last") else None) for _, item in items])


def spans_to_proto(spans: Spans) -> list[position_pb2.RowSpan]:
    """`spans` as messages; none of them may have an open end."""
    return [position_pb2.RowSpan(first=first, count=end - first) for first, end in spans]


def spans_from_proto(messages: Iterable[position_pb2.RowSpan]) -> Spans | None:
    """The spans in messages; None if any is empty, overlaps, is out of order or exceeds the largest position."""
    spans: list[Span] = []
    end = 0
    for message in messages:
        if message.first < end or message.count < 1 or message.first + message.count >= OPEN_END:
            return None
        end = message.first + message.count
        spans.append((message.first, end))
    return tuple(spans)
