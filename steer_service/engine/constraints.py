"""Checks the constraints of structured outputs before vLLM has them.

vLLM compiles them in threads of its processes, without limits: some take minutes, gigabytes or the process. Here one is
compiled first in a process of its own (`constraint_child`), with limits. What was found is kept by digest.

Relies on (vLLM 0.24 to 0.33): `XgrammarBackend`, whose compiler has the vocabulary; `choice_as_grammar`,
`grammar_is_likely_lark` and `has_xgrammar_unsupported_json_features`, with which vLLM converts and refuses constraints.
tests/engine/test_seams.py notices a change.
"""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, has_xgrammar_unsupported_json_features
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, SteerError, Unsupported, closed_error
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.engine.vllm_patches import constraint_budget
from steer_service.runtime.worker_threads import WorkerThreads

CHILD = Path(__file__).with_name("constraint_child.py")

FIELD = "sampling.structured_outputs"

NO_TOKEN = "the constraint leads to a place where no token of the model's vocabulary goes on"

MAX_WAITING = 64
"""Constraints that may wait for the process; more are refused."""

MAX_KNOWN = 4096
"""Constraints whose outcome is kept."""

REFUSED_S = 60.0
"""Seconds for which a constraint that took too much stays refused; the host may have been busy."""

MEMORY_BYTES = 1 << 30
"""Memory that compiling one constraint may take."""

KEPT_BYTES = 1 << 30
"""Memory that the compiled constraints of running requests may take together."""

PARSE_S = 0.25
"""Processor time that reading a constraint may take: vLLM reads it again for each request, while others wait."""

STEP_S = 0.05
"""Processor time that one token may take."""

START_S = 300.0
"""Seconds that the process has to import what it needs."""

RETRY_AFTER_S = 10.0
"""When a request may come again that found too many slow constraints in the engine."""

SPARE_S = 30.0
"""Seconds in which the process must answer after a constraint's own time."""


_Answer = dict[str, str | int]
"""An outcome as the process says it; see `constraint_child`."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a constraint."""

    make_error: Callable[[], SteerError] | None
    """Its refusal; None if it is served."""
    until: float = float("inf")
    """When it is to be checked again, on the monotonic clock."""
    compiled_bytes: int = 0
    """Memory that it takes when it is compiled."""


class ConstraintChecks:
    """Checks one constraint after the other. The process is started for the first, and again if it has died."""

    def __init__(self, vocabulary: Callable[[], str], *, cpu_s: int, any_whitespace: bool = True) -> None:
        """`vocabulary`: the tokenizer's, see `vocabulary_of`; called once. `cpu_s`: processor time of each constraint.

        `any_whitespace`: whether JSON may have whitespace, as in vLLM's configuration.
        """
        self._vocabulary = vocabulary
        self._limits = {
            "cpu_s": cpu_s,
            "wall_s": max(SPARE_S, 10.0 * cpu_s),
            "memory_bytes": MEMORY_BYTES,
            "parse_s": PARSE_S,
            "step_s": STEP_S,
            "any_whitespace": any_whitespace,
        }
        self._threads = WorkerThreads("structured outputs", 1, MAX_WAITING)
        self._known: OrderedDict[bytes, _Outcome] = OrderedDict()
        self._kept: dict[bytes, tuple[int, int]] = {}
        """What running requests have: the bytes of each constraint, and its uses. Only the event loop uses it."""
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._is_unsupported = False
        self._is_closed = False

    @property
    def child_pid(self) -> int | None:
        """The process that checks; None before the first constraint."""
        return self._child.process.pid if self._child is not None else None

    async def check(self, constraint: StructuredOutputs, client_id: str = "") -> None:
        """Raises unless vLLM may have `constraint`. Those of several clients are checked in turn.

        InvalidRequest: it is wrong, or takes too much time or memory. Unsupported: a schema that cannot be enforced.
        Overloaded: too many wait. EngineFailed: the process died; the next constraint starts it again.
        """
        kind, text = _as_compiled(constraint)
        key = _key_of(kind, text)
        outcome = self._find(key)
        if outcome is None:
            outcome = await self._threads.run(partial(self._check, key, kind, text), client_id)
        if outcome.make_error is not None:
            raise outcome.make_error()

    def refuse(self, constraint: StructuredOutputs) -> None:
        """Refuses `constraint` for a while: its tokens took too long when it was served."""
        kind, text = _as_compiled(constraint)
        refusal = partial(_too_complex, kind, "the time that its tokens may take")
        self._keep(_key_of(kind, text), _Outcome(refusal, time.monotonic() + REFUSED_S))

    def compiled_bytes(self, constraint: StructuredOutputs) -> int:
        """Memory that `constraint` takes when it is compiled; 0 if its check is long ago."""
        return self._bytes_of(_key_of(*_as_compiled(constraint)))

    def _bytes_of(self, key: bytes) -> int:
        outcome = self._find(key)
        return outcome.compiled_bytes if outcome is not None else 0

    @contextmanager
    def kept(self, constraint: StructuredOutputs) -> Iterator[None]:
        """Within the block, vLLM may have `constraint`, which was checked. It takes memory as long.

        Raises Overloaded if those of other requests take too much already.
        """
        key = _key_of(*_as_compiled(constraint))
        needed = self._bytes_of(key)
        if key not in self._kept and sum(size for size, _ in self._kept.values()) + needed > KEPT_BYTES:
            raise Overloaded(
                "the constraints of the requests that run take all memory that there is for them",
                reason="QUEUE_FULL",
                retry_after_s=RETRY_AFTER_S,
            )
        size, uses = self._kept.get(key, (needed, 0))
        self._kept[key] = size, uses + 1
        try:
            yield
        finally:
            size, uses = self._kept.pop(key)
            if uses > 1:
                self._kept[key] = size, uses - 1

    def close(self) -> None:
        """Ends the process; every check that runs or waits fails."""
        with self._lock:
            self._is_closed = True
            if self._child is not None:
                self._child.end()

    def _find(self, key: bytes) -> _Outcome | None:
        with self._lock:
            outcome = self._known.get(key)
            if outcome is None or outcome.until < time.monotonic():
                return None
            self._known.move_to_end(key)
            return outcome

    def _check(self, key: bytes, kind: str, text: str) -> _Outcome:
        """In the thread: one check after the other."""
        outcome = self._find(key)  # the one before may have been the same
        if outcome is None:
            outcome = self._checked(kind, text)
            self._keep(key, outcome)
        return outcome

    def _keep(self, key: bytes, outcome: _Outcome) -> None:
        with self._lock:
            self._known[key] = outcome
            self._known.move_to_end(key)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def _checked(self, kind: str, text: str) -> _Outcome:
        if kind == "json":
            try:
                if has_xgrammar_unsupported_json_features(json.loads(text)):
                    return _Outcome(_unsupported_schema)
            except TypeError:  # a value of another type than schemas have there
                return _Outcome(partial(_wrong, kind, "this is not a JSON schema"))
        if kind == "grammar" and grammar_is_likely_lark(text):
            return _Outcome(partial(_wrong, kind, "a grammar has rules as in: root ::= ..."))
        told = self._ask(kind, text)
        match told["is"]:
            case "ok":
                return _Outcome(None, compiled_bytes=int(told["bytes"]))
            case "bad":
                return _Outcome(partial(_wrong, kind, str(told["words"])))
            case "dead":
                return _Outcome(partial(_wrong, kind, NO_TOKEN))
            case "slow":
                limits = f"{self._limits['cpu_s']} s of processor time, {PARSE_S:g} s of it to be read"
                what = f"{limits}, or {STEP_S:g} s for one token"
            case _:
                what = f"{MEMORY_BYTES >> 20} MiB of memory"
        return _Outcome(partial(_too_complex, kind, what), time.monotonic() + REFUSED_S)

    def _ask(self, kind: str, text: str) -> _Answer:
        try:
            return self._running().ask({"kind": kind, "text": text, **self._limits}, self._limits["wall_s"] + SPARE_S)
        except _Ended:
            with self._lock:
                if self._child is not None:
                    self._child.end()
                    self._child = None
                if self._is_closed:
                    raise closed_error("the engine") from None
            raise EngineFailed(
                "the process that checks structured outputs ended or did not start", reason="CHECK_FAILED"
            ) from None

    def _running(self) -> "_Child":
        if self._child is not None:
            return self._child
        if self._is_unsupported:
            raise _unsupported_tokenizer()
        try:
            setup = {"vocabulary": self._vocabulary()}
        except Unsupported:
            self._is_unsupported = True  # it takes a second to see
            raise
        with self._lock:
            if self._is_closed:
                raise closed_error("the engine")
            self._child = _Child()
        self._child.ask(setup, START_S)
        return self._child


def _key_of(kind: str, text: str) -> bytes:
    return hashlib.sha256(f"{kind}:{text}".encode()).digest()


class _Ended(Exception):
    """The process ended, or did not answer in time."""


class _Child:
    """The process of `constraint_child`, which ends when this one does."""

    def __init__(self) -> None:
        self.process = _start()
        self._in_use = threading.Lock()
        """Held while a thread uses the pipes."""

    def ask(self, question: dict[str, Any], timeout_s: float) -> _Answer:
        """The answer to one line; raises _Ended."""
        asking, answering = self.process.stdin, self.process.stdout
        assert asking is not None
        assert answering is not None
        try:
            with self._in_use:
                asking.write(json.dumps(question).encode() + b"\n")
                asking.flush()
                if not select.select([answering], [], [], timeout_s)[0]:
                    raise _Ended
                answer: _Answer = json.loads(answering.readline() or "{}")
        except (OSError, ValueError) as error:  # ValueError: a closed pipe, or half an answer
            raise _Ended from error
        if not answer:
            raise _Ended
        return answer

    def end(self) -> None:
        """Kills it and its fork, so that a thread that waits for them wakes, and closes its pipes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group
        self.process.wait()
        with self._in_use:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what was not written
                        pipe.close()


def _start() -> "subprocess.Popen[bytes]":
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-P", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # warnings of xgrammar hold the constraint
        env={**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""},
        # A Ctrl-C is the server's to handle. A session of its own would get no processor time on Linux 6.18 while
        # vLLM's processes poll, see docs/limitations.md.
        process_group=0,
    )


def vocabulary_of(vllm_config: Any, tokenizer: Any) -> str:
    """The vocabulary as vLLM's backend gives it to xgrammar. Takes a second; meant for a thread.

    Raises Unsupported for a tokenizer that xgrammar does not know, or without xgrammar.
    """
    size = vllm_config.model_config.get_vocab_size()
    try:
        backend = XgrammarBackend(vllm_config, tokenizer=tokenizer, vocab_size=size)
        return str(backend.compiler.compile_grammar('root ::= "a"').tokenizer_info.serialize_json())
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise _unsupported_tokenizer() from error


def _as_compiled(constraint: StructuredOutputs) -> tuple[str, str]:
    """The kind and the text that vLLM compiles."""
    if constraint.choice is not None:
        return "choice", choice_as_grammar(list(constraint.choice))
    for kind in ("json", "regex", "grammar"):
        text = getattr(constraint, kind)
        if text is not None:
            return kind, text
    raise AssertionError("a constraint has one kind")


def _wrong(kind: str, words: str) -> SteerError:
    return InvalidRequest(words, reason="BAD_CONSTRAINT", field=f"{FIELD}.{kind}")


def _too_complex(kind: str, what: str) -> SteerError:
    return InvalidRequest(
        f"the constraint is too complex: it needs more than {what}",
        reason="CONSTRAINT_TOO_COMPLEX",
        field=f"{FIELD}.{kind}",
    )


def error_of_vllm(stop_reason: int | str | None, options: SamplingOptions) -> SteerError:
    """The error of a constrained output that vLLM ended with an error."""
    match stop_reason:
        case constraint_budget.TOO_SLOW:
            words = "the constraint is too complex: its tokens take too long to find"
            return InvalidRequest(words, reason="CONSTRAINT_TOO_COMPLEX", field=FIELD)
        case constraint_budget.FAILED:
            words = "the constraint is too complex: it could not be compiled for the engine"
            return InvalidRequest(words, reason="CONSTRAINT_TOO_COMPLEX", field=FIELD)
        case constraint_budget.TOO_MANY_SLOW:
            words = "the constraints of other requests take too long; no other is begun until one of them ends"
            return Overloaded(words, reason="QUEUE_FULL", retry_after_s=RETRY_AFTER_S)
    excluding = (options.bad_words, options.allowed_token_ids is not None, options.logit_bias, options.stop_token_ids)
    if options.min_tokens or any(excluding):
        words = "no token is left to choose: those that the constraint allows are excluded by other options"
        return InvalidRequest(words, reason="NO_TOKEN_LEFT", field=FIELD)
    return InvalidRequest(NO_TOKEN, reason="BAD_CONSTRAINT", field=FIELD)


def _unsupported_tokenizer() -> SteerError:
    return Unsupported(
        "structured outputs do not work with the tokenizer of this model", reason="NO_STRUCTURED_OUTPUTS", field=FIELD
    )


def _unsupported_schema() -> SteerError:
    return Unsupported(
        "the schema has what cannot be enforced: multipleOf, uniqueItems, contains, an unknown format, a pattern with "
        "a length, several in allOf, or propertyNames or patternProperties with others",
        reason="UNSUPPORTED_SCHEMA",
        field=f"{FIELD}.json",
    )
