"""Ends a request whose constraint makes the engine core's steps slow.

For each token of a request with structured outputs, vLLM's engine core computes which tokens may follow, between two
steps of all requests. With an ambiguous grammar, or a regular expression such as `(a*)*b`, every token costs more than
the one before, without end. `engine/constraints.py` refuses what is slow at once; the rest is noticed here.

Relies on (vLLM 0.24 to 0.33): `StructuredOutputManager._create_grammar`, in which every request's grammar is made;
`StructuredOutputGrammar.accept_tokens`, after whose refusal the scheduler ends the request with the reason "error";
`Request.stop_reason`, which its output has. tests/engine/test_seams.py and
tests/engine/vllm_patches/test_constraint_budget.py notice a change.
"""

import time
from typing import Any

FIRST_S = 1.0
"""Processor time that the constraint of one output may take."""

PER_TOKEN_S = 0.005
"""What it may take for each token besides. Usual constraints take 0.0001 s."""

TOO_SLOW = "steerllm: constraint too slow"
"""The stop reason of a request that was ended for its constraint."""


def limit_constraints(manager: Any) -> None:
    """Makes this manager of structured outputs end a request whose constraint is too slow. Costs 2 us per token."""
    create = manager._create_grammar

    def limited(request: Any) -> Any:
        grammar = create(request)
        _limit(grammar, request)
        return grammar

    manager._create_grammar = limited  # on the instance: other engines in this process are unchanged


def _limit(grammar: Any, request: Any) -> None:
    accept_tokens, fill_bitmask = grammar.accept_tokens, grammar.fill_bitmask
    left_s = FIRST_S

    def timed_fill(bitmask: Any, index: int) -> None:
        nonlocal left_s
        began = time.thread_time()
        fill_bitmask(bitmask, index)
        left_s -= time.thread_time() - began

    def timed_accept(request_id: str, tokens: list[int]) -> bool:
        nonlocal left_s
        began = time.thread_time()
        is_accepted = bool(accept_tokens(request_id, tokens))
        left_s = min(FIRST_S, left_s + PER_TOKEN_S * len(tokens) - (time.thread_time() - began))
        if left_s < 0.0 and is_accepted:
            request.stop_reason = TOO_SLOW
            return False
        return is_accepted

    grammar.accept_tokens, grammar.fill_bitmask = timed_accept, timed_fill
