"""A request whose constraint becomes slow is ended. The manager is a stand-in; `test_seams.py` checks vLLM itself."""

import gc
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from steer_service.engine.vllm_patches import constraint_budget
from steer_service.engine.vllm_patches.constraint_budget import (
    FAILED,
    MOST_GIVEN_UP,
    TOO_MANY_SLOW,
    TOO_SLOW,
    limit_constraints,
)

ALLOWED = 5
MASK = [1 << ALLOWED, 0]
"""Allows one token of 64."""

EVERY = [-1, -1]
LIMIT_S = 60.0


class Request:
    stop_reason: str | None = None


class Grammar:
    """Works for `work_s` of processor time at each call, or until `go_on` is set, without Python's lock."""

    def __init__(self) -> None:
        self.work_s = 0.0
        self.taken: list[int] = []
        self.error: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.thread: threading.Thread | None = None

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        self._work()
        if self.error is not None:
            raise self.error
        bitmask[index] = torch.tensor(MASK, dtype=torch.int32)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._work()
        self.taken += tokens
        return tokens == [ALLOWED]

    def is_terminated(self) -> bool:
        return False

    def _work(self) -> None:
        self.thread = threading.current_thread()
        until = time.thread_time() + self.work_s
        while time.thread_time() < until or not self.go_on.is_set():
            hashlib.sha256(bytes(1 << 20))  # leaves the lock to others meanwhile


class Manager:
    def __init__(self, *, has_threads: bool) -> None:
        self.error: Exception | None = None
        if has_threads:
            self.executor_for_fillmask = ThreadPoolExecutor(1)

    def _create_grammar(self, request: Request) -> Grammar:
        if self.error is not None:
            raise self.error
        return Grammar()

    def grammar_bitmask(self, grammars: list[Grammar]) -> list[list[int]]:
        """The masks of one step."""
        mask = torch.zeros(len(grammars), 2, dtype=torch.int32)
        for index, grammar in enumerate(grammars):
            if hasattr(self, "executor_for_fillmask"):
                self.executor_for_fillmask.submit(grammar.fill_bitmask, mask, index).result()
            else:
                grammar.fill_bitmask(mask, index)
        return [[int(word) for word in row] for row in mask]


@pytest.fixture(params=[False, True], ids=["one thread", "several threads"])
def manager(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Manager]:
    monkeypatch.setattr(constraint_budget, "FIRST_S", 0.1)
    before = set(threading.enumerate())
    made = Manager(has_threads=request.param)
    limit_constraints(made)
    yield made
    if request.param:
        made.executor_for_fillmask.shutdown(wait=False)
    del made._create_grammar, made.grammar_bitmask
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(LIMIT_S)


@pytest.fixture
def stopped(manager: Manager) -> Iterator[list[tuple[Grammar, Request]]]:
    """Grammars that compute until they may go on, as they do when the test ends."""
    grammars = [begun(manager) for _ in range(MOST_GIVEN_UP)]
    for grammar, _ in grammars:
        grammar.go_on.clear()
    yield grammars
    for grammar, _ in grammars:
        grammar.go_on.set()


def begun(manager: Manager) -> tuple[Grammar, Request]:
    request = Request()
    return manager._create_grammar(request), request


def tokens_until_the_end(manager: Manager, grammar: Grammar, most: int) -> int:
    for count in range(most):
        manager.grammar_bitmask([grammar])
        if not grammar.accept_tokens("id", [ALLOWED]):
            return count
    return most


def wait_for_the_end(grammar: Grammar) -> None:
    grammar.go_on.set()
    assert grammar.thread is not None
    grammar.thread.join(LIMIT_S)
    assert not grammar.thread.is_alive()


def test_a_fast_constraint_is_left_alone(manager: Manager) -> None:
    grammar, request = begun(manager)
    assert tokens_until_the_end(manager, grammar, 1000) == 1000
    assert request.stop_reason is None
    assert manager.grammar_bitmask([grammar, grammar]) == [MASK, MASK]
    assert grammar.taken == [ALLOWED] * 1000


def test_a_slow_constraint_ends_its_request_with_a_reason(manager: Manager) -> None:
    grammar, request = begun(manager)
    assert tokens_until_the_end(manager, grammar, 200) == 200
    grammar.work_s = 0.004  # no mask takes as long as a look at it is away

    assert tokens_until_the_end(manager, grammar, 1000) <= 30
    assert request.stop_reason == TOO_SLOW


def test_a_token_outside_the_mask_is_refused_and_not_called_slow(manager: Manager) -> None:
    grammar, request = begun(manager)
    manager.grammar_bitmask([grammar])
    assert not grammar.accept_tokens("id", [ALLOWED + 1])
    assert request.stop_reason is None


def test_tokens_without_a_mask_are_judged_by_the_grammar(manager: Manager) -> None:
    grammar, _ = begun(manager)
    assert grammar.accept_tokens("id", [ALLOWED])
    assert not grammar.accept_tokens("id", [ALLOWED, ALLOWED])
    assert grammar.taken == [ALLOWED] * 3


def test_an_error_of_a_constraint_is_raised(manager: Manager) -> None:
    grammar, _ = begun(manager)
    grammar.error = IndexError("a row")
    with pytest.raises(IndexError, match="a row"):
        manager.grammar_bitmask([grammar])


def test_a_mask_that_is_not_made_in_time_is_given_up_and_ends_its_request(
    manager: Manager, stopped: list[tuple[Grammar, Request]]
) -> None:
    grammar, request = stopped[0]
    neighbours = [begun(manager)[0], begun(manager)[0]]

    assert manager.grammar_bitmask([neighbours[0], grammar, neighbours[1]]) == [MASK, EVERY, MASK]

    assert grammar.thread is not None
    assert grammar.thread.is_alive()
    assert os.getpriority(os.PRIO_PROCESS, grammar.thread.native_id or 0) == 19
    assert not grammar.accept_tokens("id", [ALLOWED])
    assert request.stop_reason == TOO_SLOW
    assert [tokens_until_the_end(manager, neighbour, 10) for neighbour in neighbours] == [10, 10]


def test_a_token_that_is_not_taken_in_time_ends_its_request(manager: Manager) -> None:
    grammar, request = begun(manager)
    manager.grammar_bitmask([grammar])
    grammar.go_on.clear()
    assert grammar.accept_tokens("id", [ALLOWED])

    assert manager.grammar_bitmask([grammar]) == [EVERY]

    grammar.go_on.set()
    assert not grammar.accept_tokens("id", [ALLOWED])
    assert request.stop_reason == TOO_SLOW


def test_a_mask_that_comes_too_late_changes_nothing(manager: Manager, stopped: list[tuple[Grammar, Request]]) -> None:
    (grammar, _), neighbour = stopped[0], begun(manager)[0]
    masks = manager.grammar_bitmask([grammar, neighbour])

    wait_for_the_end(grammar)

    assert masks == manager.grammar_bitmask([grammar, neighbour]) == [EVERY, MASK]


def test_no_constraint_is_begun_while_too_many_were_given_up(
    manager: Manager, stopped: list[tuple[Grammar, Request]]
) -> None:
    assert manager.grammar_bitmask([grammar for grammar, _ in stopped]) == [EVERY] * MOST_GIVEN_UP
    refused, request = begun(manager)
    assert manager.grammar_bitmask([refused]) == [EVERY]
    assert not refused.is_terminated()
    assert not refused.accept_tokens("id", [ALLOWED])
    assert request.stop_reason == TOO_MANY_SLOW

    wait_for_the_end(stopped[0][0])

    assert tokens_until_the_end(manager, begun(manager)[0], 10) == 10


def test_a_constraint_that_is_not_compiled_ends_its_request(manager: Manager) -> None:
    manager.error = RuntimeError("bad_alloc")
    grammar, request = begun(manager)
    assert manager.grammar_bitmask([grammar]) == [EVERY]
    assert not grammar.accept_tokens("id", [ALLOWED])
    assert request.stop_reason == FAILED
