"""A request whose constraint becomes slow is ended. The manager is a stand-in; `test_seams.py` checks vLLM itself."""

import time
from typing import Any

import pytest

from steer_service.engine.vllm_patches import constraint_budget
from steer_service.engine.vllm_patches.constraint_budget import TOO_SLOW, limit_constraints


class Request:
    stop_reason: str | None = None


class Grammar:
    """Works for `work_s` of processor time at each call."""

    def __init__(self) -> None:
        self.work_s = 0.0
        self.accepts = True

    def fill_bitmask(self, bitmask: Any, index: int) -> None:
        self._work()

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._work()
        return self.accepts

    def _work(self) -> None:
        until = time.thread_time() + self.work_s
        while time.thread_time() < until:
            pass


class Manager:
    def _create_grammar(self, request: Request) -> Grammar:
        return Grammar()


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> tuple[Grammar, Request]:
    monkeypatch.setattr(constraint_budget, "FIRST_S", 0.1)
    manager, request = Manager(), Request()
    limit_constraints(manager)
    return manager._create_grammar(request), request


def tokens_until_the_end(grammar: Grammar, most: int) -> int:
    for count in range(most):
        grammar.fill_bitmask(None, 0)
        if not grammar.accept_tokens("id", [1]):
            return count
    return most


def test_a_fast_constraint_is_left_alone(limited: tuple[Grammar, Request]) -> None:
    grammar, request = limited
    assert tokens_until_the_end(grammar, 1000) == 1000
    assert request.stop_reason is None


def test_a_slow_constraint_ends_its_request_with_a_reason(limited: tuple[Grammar, Request]) -> None:
    grammar, request = limited
    assert tokens_until_the_end(grammar, 200) == 200
    grammar.work_s = 0.01

    assert tokens_until_the_end(grammar, 1000) <= 10
    assert request.stop_reason == TOO_SLOW


def test_a_token_that_the_constraint_refuses_is_not_called_slow(limited: tuple[Grammar, Request]) -> None:
    grammar, request = limited
    grammar.accepts = False
    assert tokens_until_the_end(grammar, 10) == 0
    assert request.stop_reason is None
