"""The checker of histories finds each kind of violation, and accepts what may happen."""

from dataclasses import replace
from typing import Any

import pytest

from bench.soak.history import End, Operation, Reference, left_behind, violations

REFERENCES = {"plain": Reference((7, 8, 9)), "held": Reference((4, 5), "hash of rows")}
RIGHT = {"plain": {"tokens": (7, 8, 9)}, "held": {"tokens": (4, 5), "rows": "hash of rows"}}


def generated(name: str = "r1", asked: str = "plain", at: float = 1.0, **changes: Any) -> Operation:
    end = {
        "status": "OK",
        **RIGHT[asked],
        **{key: changes.pop(key) for key in set(changes) & {"status", "tokens", "rows"}},
    }
    return Operation(
        began_s=at, owner="a", kind="generate", id=name, asked=asked, **changes, ends=[End(at_s=at + 1, **end)]
    )


def call(kind: str, at: float, status: str = "OK", rows: str = "", reason: str = "", **changes: Any) -> Operation:
    owner = changes.pop("owner", "a")
    ends = [End(at_s=at + 0.5, status=status, rows=rows, reason=reason)]
    return Operation(began_s=at, owner=owner, kind=kind, id="c1", ends=ends, **changes)


def fetched(at: float, status: str = "OK", rows: str = "hash of rows", **changes: Any) -> Operation:
    return call("fetch", at, status, rows if status == "OK" else "", asked="held", **changes)


MISSING = frozenset({"NOT_FOUND"})


def rules(*operations: Operation, **options: Any) -> list[str]:
    return [found.split(": ")[0] for found in violations(operations, REFERENCES, **{"least_done": 0, **options})]


def test_a_right_history_is_accepted():
    history = [
        generated(),
        generated("r2", "held", 2.0),
        fetched(4.0),
        fetched(4.2, "NOT_FOUND", owner="b", of="a", allowed=MISSING),
        call("release", 4.5, owner="b", of="a"),
        fetched(5.5),
        call("release", 6.0),
        fetched(6.5, "NOT_FOUND", allowed=MISSING),
        generated("r3", at=7.0, status="UNAVAILABLE", tokens=(7,)),
        generated("r1", at=8.0),  # an id may be used again
        generated("r1", at=8.5, status="ALREADY_EXISTS", tokens=(), allowed=frozenset({"ALREADY_EXISTS"})),
    ]
    assert violations(history, REFERENCES, outages=[(7.5, 7.7)], least_done=3) == []


@pytest.mark.parametrize(
    ("rule", "operation"),
    [
        ("wrong tokens from number 2 on", generated(tokens=(7, 8, 1))),
        ("wrong tokens from number 0 on", generated(tokens=(8,), status="CANCELLED", allowed=frozenset({"CANCELLED"}))),
        ("2 tokens in place of 3", generated(tokens=(7, 8))),
        ("wrong rows", generated(asked="held", rows="another hash")),
        ("wrong rows", fetched(1.0, rows="another hash")),
        ("status", generated(status="INTERNAL")),
        ("status", generated(status="UNKNOWN", allowed=frozenset({"UNKNOWN"}))),
        ("status", generated(status="UNAVAILABLE")),
        ("read or stopped what belongs to another", fetched(1.0, owner="b", of="a")),
        ("read or stopped what belongs to another", call("cancel", 1.0, reason="cancelled", owner="b", of="a")),
        ("fetched after its expiry", fetched(9.0, expires_s=8.0)),
        (
            "refused for an id that is not in use",
            generated(status="ALREADY_EXISTS", tokens=(), allowed=frozenset({"ALREADY_EXISTS"})),
        ),
    ],
)
def test_a_wrong_operation_is_found(rule: str, operation: Operation):
    assert rules(operation) == [rule]


@pytest.mark.parametrize(("count", "ends"), [(0, []), (2, [End(at_s=2.0, status="OK", tokens=(7, 8, 9))] * 2)])
def test_a_request_has_exactly_one_terminal_state(count: int, ends: list[End]):
    one = generated()
    one.ends = ends
    assert rules(one) == [f"{count} terminal states"]


def test_nothing_is_fetched_after_a_release_that_had_ended():
    assert rules(call("release", 1.0), fetched(1.4)) == []  # it may have come first
    assert rules(call("release", 1.0), fetched(2.0)) == ["fetched after its release"]
    assert rules(call("release", 1.0, owner="b", of="a"), fetched(2.0)) == []


def test_an_id_of_another_client_refuses_nothing():
    other = generated("r1")
    other.owner = "b"
    refused = generated("r1", at=1.2, status="ALREADY_EXISTS", tokens=(), allowed=frozenset({"ALREADY_EXISTS"}))
    assert rules(other, refused) == ["refused for an id that is not in use"]


def test_a_request_is_quarantined_only_after_it_met_three_deaths_of_the_engine():
    lost = [generated(f"r{at}", at=float(at), status="UNAVAILABLE", tokens=()) for at in (10, 20, 30)]
    refused = generated("r4", at=40.0, status="FAILED_PRECONDITION", tokens=())
    refused.ends[0] = replace(refused.ends[0], reason="QUARANTINED")
    outages = [(one.began_s + 0.5, one.began_s + 1.0) for one in lost]
    assert rules(*lost, refused, outages=outages) == []
    assert rules(*lost[1:], refused, outages=outages) == ["status"]


def test_a_run_without_enough_work_fails():
    assert rules(generated(), least_done=2) == ["1 requests completed, fewer than 2"]


def test_what_is_left_behind_is_listed():
    assert left_behind({"tasks": 3, "held": 0}, {"tasks": 5, "held": 1}, {"tasks": 2}) == ["held: 1, 0 before"]
