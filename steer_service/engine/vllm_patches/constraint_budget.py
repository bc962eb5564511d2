"""Ends a request whose constraint makes the engine core's steps slow.

For each token of a request with structured outputs, vLLM's engine core computes which tokens may follow, between two
steps of all requests. With an ambiguous grammar, or a regular expression such as `(a*)*b`, every token costs more than
the one before, without end, and one token may take minutes. `engine/constraints.py` refuses what is slow at once; the
rest is noticed here. Nothing can stop a computation of xgrammar, but it leaves Python's lock to others: the masks of
one step are made in a thread of their own, which is given up, at the lowest priority, when the request whose mask it
makes has used up its time. The masks of the others are then made again.

A chosen token is looked up in its mask; the grammar takes it, which may be slow too, before the next mask is made.

Relies on (vLLM 0.24 to 0.33): `StructuredOutputManager._create_grammar`, in which every request's grammar is made, and
`grammar_bitmask`, in which the masks of one step are; `StructuredOutputGrammar.fill_bitmask`, which writes one row of
a mask, a bit for each token; `accept_tokens`, which takes each chosen token, and after whose refusal the scheduler ends
the request with the reason "error"; `executor_for_fillmask`; `Request.stop_reason`, which its output has.
tests/engine/test_seams.py and tests/engine/vllm_patches/test_constraint_budget.py notice a change.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FIRST_S = 0.25
"""Processor time that the constraint of one output may take."""

PER_TOKEN_S = 0.002
"""What it may take for each token besides. Usual constraints take 0.0001 s."""

LOOK_S = 0.02
"""Seconds between two looks at the processor time of masks that are being made."""

MOST_GIVEN_UP = 4
"""Constraints that were given up and whose masks are still being made; until one ends, no other is begun."""

TOO_SLOW = "steerllm: constraint too slow"
"""The stop reason of a request that was ended for its constraint."""

TOO_MANY_SLOW = "steerllm: too many slow constraints"
"""The stop reason of a request that was ended since the constraints of others are still being computed."""

FAILED = "steerllm: constraint failed"
"""The stop reason of a request whose constraint could not be compiled."""

_NO_WORDS: npt.NDArray[np.int32] = np.zeros((0, 0), dtype=np.int32)

LOGGER = logging.getLogger(__name__)


def limit_constraints(manager: Any) -> None:
    """Makes this manager of structured outputs end a request whose constraint is too slow.

    Costs 0.1 ms in each step that has constraints, and 0.03 ms for each. Compiles one constraint at a time, since
    each may take much memory.
    """
    create, make_masks = manager._create_grammar, manager.grammar_bitmask
    computing: set[_Limited] = set()
    one_compilation = threading.Lock()
    helper = _Helper()

    def limited_create(request: Any) -> Any:
        if sum(limited.is_given_up for limited in tuple(computing)) >= MOST_GIVEN_UP:
            return _Refusal(request, TOO_MANY_SLOW)
        try:
            with one_compilation:
                grammar = create(request)
        except Exception:  # vLLM 0.24 would end the engine core
            LOGGER.exception("a constraint was not compiled")
            return _Refusal(request, FAILED)
        limited = _Limited(grammar, request, computing)
        grammar.fill_bitmask, grammar.accept_tokens = limited.fill_bitmask, limited.accept_tokens
        return grammar

    def limited_masks(*args: Any, **kwargs: Any) -> Any:
        nonlocal helper
        while True:
            result = helper.run(lambda: make_masks(*args, **kwargs), lambda: _give_up_slow(computing))
            if result is not None:
                return result()
            helper = _Helper()
            _replace_executor(manager)

    manager._create_grammar = limited_create  # on the instance: other engines in this process are unchanged
    manager.grammar_bitmask = limited_masks


def _give_up_slow(computing: "set[_Limited]") -> bool:
    """Gives up each constraint that has used up its time; True if there was one."""
    slow = [limited for limited in tuple(computing) if not limited.is_given_up and limited.is_over]
    for limited in slow:
        limited.give_up()
    return bool(slow)


def _replace_executor(manager: Any) -> None:
    """Gives vLLM other threads for many masks: one of them may be what was given up."""
    executor = getattr(manager, "executor_for_fillmask", None)
    if executor is not None:
        manager.executor_for_fillmask = ThreadPoolExecutor(max_workers=executor._max_workers)
        executor.shutdown(wait=False, cancel_futures=True)


class _Refusal:
    """The grammar of a request that is not served: it allows every token and accepts none."""

    def __init__(self, request: Any, reason: str) -> None:
        self._request = request
        self._reason = reason

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        bitmask[index].fill_(-1)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._request.stop_reason = self._reason
        return False

    def is_terminated(self) -> bool:
        return False


class _GivenUp(Exception):
    """Ends the making of masks that nobody waits for any more."""


class _Limited:
    """A grammar of vLLM with a limit on its processor time."""

    def __init__(self, grammar: Any, request: Any, computing: "set[_Limited]") -> None:
        """`computing`: the grammars whose masks are being made."""
        self.is_given_up = False
        self._grammar = grammar
        self._fill, self._accept = grammar.fill_bitmask, grammar.accept_tokens
        self._refusal = _Refusal(request, TOO_SLOW)
        self._computing = computing
        self._left_s = FIRST_S
        self._chosen: tuple[str, list[int]] | None = None
        """What the grammar has not taken yet."""
        self._is_wrong = False
        self._row: torch.Tensor | None = None
        """Its own mask, shape [1, words]: what was given up may still write there."""
        self._has_row = False
        """Whether the next token is chosen from it."""
        self._bitmask: torch.Tensor | None = None
        self._row_words = self._bitmask_words = _NO_WORDS  # the same memory: NumPy copies and reads it 5 times as fast
        self._thread, self._clock, self._began = 0, 0, 0.0

    @property
    def is_over(self) -> bool:
        """Whether the mask that is being made takes too long."""
        return time.clock_gettime(self._clock) - self._began > max(self._left_s, 0.0)

    def give_up(self) -> None:
        """Refuses from now on; other threads go before the one that makes the mask."""
        self.is_given_up = True
        with suppress(OSError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, self._thread, 19)

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        """Writes the mask of the next token into one row."""
        if self.is_given_up:
            return self._refusal.fill_bitmask(bitmask, index)
        if self._bitmask is not bitmask:
            self._bitmask, self._row = bitmask, torch.empty_like(bitmask[:1])
            self._bitmask_words, self._row_words = bitmask.numpy(), self._row.numpy()
        self._thread, self._clock = threading.get_native_id(), time.pthread_getcpuclockid(threading.get_ident())
        self._began = time.clock_gettime(self._clock)
        self._computing.add(self)
        try:
            self._make_row()
        finally:
            self._computing.discard(self)
        if self.is_given_up:
            raise _GivenUp
        self._left_s -= time.clock_gettime(self._clock) - self._began
        self._bitmask_words[index] = self._row_words[0]
        self._has_row = True
        return None

    def _make_row(self) -> None:
        if self._chosen is not None:
            self._is_wrong = not self._accept(*self._chosen)
            self._chosen = None
        if self._is_wrong or self._grammar.is_terminated():
            self._row_words.fill(-1)
        else:
            self._fill(self._row, 0)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Whether the request may go on after `tokens`."""
        self._left_s = min(FIRST_S, self._left_s + PER_TOKEN_S * len(tokens))
        if self.is_given_up or self._left_s < 0.0:
            return self._refusal.accept_tokens(request_id, tokens)
        has_row, self._has_row = self._has_row, False
        if self._is_wrong:
            return False
        if not has_row or len(tokens) != 1:
            return bool(self._accept(request_id, tokens))
        self._chosen = request_id, tokens
        [token] = tokens
        return bool(int(self._row_words[0, token >> 5]) >> (token & 31) & 1)


class _Work:
    """What a helper's thread has to do. The thread keeps this and not the helper, and so ends with the helper."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Lock(), threading.Lock()  # held until there is a function, and a result
        self.begun.acquire()
        self.ended.acquire()
        self.function: Callable[[], Any] | None = None
        self.result: Callable[[], Any] | None = None

    def do(self) -> None:
        """In the thread: runs one function after the other, until it finds None."""
        while True:
            self.begun.acquire()
            function, self.function = self.function, None
            if function is None:
                return
            self.result = _result_of(function)
            del function
            self.ended.release()

    def end(self) -> None:
        """Ends the thread after what it runs."""
        self.begun.release()


class _Helper:
    """A thread that runs functions for another one, which can stop waiting."""

    def __init__(self) -> None:
        self._work = _Work()
        weakref.finalize(self, self._work.end).atexit = False
        threading.Thread(target=self._work.do, name="steerllm-masks", daemon=True).start()

    def run(self, function: Callable[[], Any], is_slow: Callable[[], bool]) -> Callable[[], Any] | None:
        """A function that returns or raises what `function` did; None if `is_slow` said so, and it goes on."""
        self._work.function = function
        self._work.begun.release()
        while not self._work.ended.acquire(timeout=LOOK_S):
            if is_slow():
                return None
        result, self._work.result = self._work.result, None
        return result


def _result_of(function: Callable[[], Any]) -> Callable[[], Any]:
    try:
        value = function()
    except BaseException as error:
        caught = error

        def fail() -> Any:
            raise caught

        return fail
    return lambda: value
