"""What clients asked and received, and the check that all of it may have happened.

Times are of one monotonic clock, in seconds.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

OK = frozenset({"OK"})

NEVER = frozenset({"UNKNOWN"})
"""Statuses that no fault excuses."""

DEATHS = 3
"""Deaths of the engine at which a request was in flight, after which the server may refuse to run it again."""

END_S = 5.0
"""Seconds after its client saw it end in which a request may still hold its id on the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A terminal state."""

    at_s: float
    """When the client saw it."""
    status: str
    """Name of the status code."""
    reason: str = ""
    """Reason of a refusal; "cancelled" for a Cancel that stopped a request."""
    tokens: tuple[int, ...] = field(default=(), repr=False)
    """Tokens that were received until then."""
    rows: str = ""
    """SHA-256 of the captured rows; "" without a capture."""


@dataclass(slots=True, kw_only=True)
class Operation:
    """One call of a client."""

    began_s: float
    """When it was sent."""
    owner: str
    """The client."""
    kind: str
    """`generate`, `fetch`, `release`, `cancel`, `session`, `lease`, or `send` for bytes that are sent to a method."""
    id: str
    """Id of the request or of the capture; the name of the segment or method."""
    asked: str = ""
    """Name of its reference; "" if any result is right."""
    of: str = ""
    """The client that the request or capture belongs to; "" for the caller itself."""
    allowed: frozenset[str] = OK
    """Statuses that it may have."""
    expires_s: float = math.inf
    """When a fetched capture has surely expired."""
    fault: str = ""
    """What was done to it, for the report."""
    ends: list[End] = field(default_factory=list)
    """Its terminal states: there must be one."""

    @property
    def ended_s(self) -> float:
        """When it first ended; infinite if it did not."""
        return self.ends[0].at_s if self.ends else math.inf

    @property
    def is_foreign(self) -> bool:
        """True for a call about something of another client."""
        return bool(self.of) and self.of != self.owner


@dataclass(frozen=True, slots=True)
class Reference:
    """The right result of a request, computed alone."""

    tokens: tuple[int, ...]
    rows: str = ""


Spans = Sequence[tuple[float, float]]


def violations(
    operations: Sequence[Operation],
    references: Mapping[str, Reference],
    *,
    outages: Spans = (),
    least_done: int = 1,
) -> list[str]:
    """What cannot have happened on a server that keeps its promises.

    `outages`: from when until when there was no engine; then UNAVAILABLE is allowed too. `least_done`: requests that
    must have completed with their reference, or the run shows nothing.
    """
    holders: dict[tuple[str, str], list[Operation]] = {}
    released: dict[str, float] = {}
    for one in operations:
        if one.kind == "generate":
            holders.setdefault((one.owner, one.id), []).append(one)
        elif one.kind == "release" and not one.is_foreign and _has_ended(one, "OK"):
            released[one.id] = min(one.ended_s, released.get(one.id, math.inf))
    met = _outages_met(operations, outages)
    found = []
    for one in operations:
        others = holders.get((one.owner, one.id), ())
        found += [f"{rule}: {one}" for rule in _broken(one, references, outages, others, released, met)]
    done = sum(one.kind == "generate" and bool(one.asked) and _has_ended(one, "OK") for one in operations)
    return found if done >= least_done else [*found, f"{done} requests completed, fewer than {least_done}"]


def _broken(
    one: Operation,
    references: Mapping[str, Reference],
    outages: Spans,
    holders: Sequence[Operation],
    released: Mapping[str, float],
    met: Mapping[tuple[str, str], int],
) -> Iterator[str]:
    """The rules that an operation breaks."""
    if len(one.ends) != 1:
        yield f"{len(one.ends)} terminal states"
        return
    end = one.ends[0]
    excused = {"UNAVAILABLE"} if any(_met(one, outage) for outage in outages) else set()
    if end.reason == "QUARANTINED" and met[one.owner, one.asked] >= DEATHS:
        excused.add("FAILED_PRECONDITION")
    if end.status in NEVER or end.status not in one.allowed | excused:
        yield "status"
    if end.status == "ALREADY_EXISTS" and not any(_overlaps(one, other) for other in holders):
        yield "refused for an id that is not in use"
    if one.is_foreign and (end.status == "OK" if one.kind == "fetch" else end.reason == "cancelled"):
        yield "read or stopped what belongs to another"
    if one.kind == "fetch" and end.status == "OK":
        if one.began_s > released.get(one.id, math.inf):
            yield "fetched after its release"
        if one.began_s > one.expires_s:
            yield "fetched after its expiry"
    if one.asked and one.kind in ("generate", "fetch"):
        yield from _differences(one, end, references[one.asked])


def _outages_met(operations: Sequence[Operation], outages: Spans) -> Counter[tuple[str, str]]:
    """At how many outages a client waited for the same result, by client and what it asked."""
    return Counter(
        who
        for outage in outages
        for who in {(one.owner, one.asked) for one in operations if one.kind == "generate" and _met(one, outage)}
    )


def _met(one: Operation, outage: tuple[float, float]) -> bool:
    return one.began_s <= outage[1] and outage[0] <= one.ended_s


def _differences(one: Operation, end: End, right: Reference) -> Iterator[str]:
    if one.kind == "generate" and right.tokens[: len(end.tokens)] != end.tokens:
        at = next(at for at, token in enumerate(end.tokens) if right.tokens[at : at + 1] != (token,))
        yield f"wrong tokens from number {at} on"
    if end.status == "OK":
        if one.kind == "generate" and len(end.tokens) != len(right.tokens):
            yield f"{len(end.tokens)} tokens in place of {len(right.tokens)}"
        if end.rows != right.rows:
            yield "wrong rows"


def _has_ended(one: Operation, status: str) -> bool:
    return [end.status for end in one.ends] == [status]


def _overlaps(one: Operation, other: Operation) -> bool:
    """True if `other` may have held the id when `one` came."""
    if other is one or _has_ended(other, "ALREADY_EXISTS"):
        return False
    return other.began_s <= one.ended_s and one.began_s <= other.ended_s + END_S


def left_behind(before: Mapping[str, int], after: Mapping[str, int], slack: Mapping[str, int]) -> list[str]:
    """What the server has more of than before the run, beyond `slack`."""
    return [
        f"{name}: {after[name]}, {count} before"
        for name, count in before.items()
        if after[name] > count + slack.get(name, 0)
    ]
