"""The process that compiles constraints before vLLM does: a wrong or hostile one ends a child of it, and nothing else.

Run as a file, so that it imports neither vLLM nor this package. It reads lines of JSON and answers each with one line.
The first has the vocabulary, each other a constraint. Each constraint is compiled in a fork, which the system ends if
it takes too much processor time or memory. The process has one thread, since forks of several are not safe. It ends
with its fork when its input does.

Relies on (xgrammar 0.2): `TokenizerInfo.deserialize_json`, the parsers of `Grammar`, the `GrammarCompiler` of vLLM's
backend with its arguments, `CompiledGrammar.memory_size_bytes`, `GrammarMatcher`. tests/engine/test_constraints.py
notices a change.
"""

import contextlib
import json
import os
import random
import re
import resource
import select
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import xgrammar

WALKS = 4
"""Texts that are begun with a compiled constraint, to see what its tokens cost."""

STEPS = 12
"""Tokens of each of them; in half of them besides the text that the constraint forces."""

STACK_BYTES = 1 << 20
"""Stack with which a constraint is compiled: less than the threads have in which vLLM compiles it."""

TOO_SLOW = (signal.SIGPROF, signal.SIGXCPU)

PLACE = re.compile(r"^\[[0-9:]+\] \S+:\d+: ")
"""Time and source file before a sentence of the compiler."""

MAX_WORDS = 300
"""Characters of a sentence of the compiler that are passed on."""

OK, BAD, DEAD, SLOW, LARGE = "ok", "bad", "dead", "slow", "large"
"""What becomes of a constraint: it is served, it is wrong, no token goes on, or it takes too much time or memory."""

Outcome = dict[str, str | int]


def main() -> None:
    """Answers until the input ends."""
    setup = json.loads(sys.stdin.buffer.readline())
    info = xgrammar.TokenizerInfo.deserialize_json(setup["vocabulary"])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    _answer({"is": OK})
    for line in sys.stdin.buffer:
        _answer(_outcome(compiler, json.loads(line)))


def _answer(outcome: Outcome) -> None:
    sys.stdout.write(json.dumps(outcome) + "\n")
    sys.stdout.flush()


def _outcome(compiler: Any, asked: dict[str, Any]) -> Outcome:
    """Compiles one constraint in a fork and says what became of it."""
    reading, writing = os.pipe()
    fork = os.fork()
    if fork == 0:
        for inherited in (reading, sys.stdin.fileno(), sys.stdout.fileno()):
            os.close(inherited)  # a server that waits for this process to end waits for what holds its pipes
        _compile_and_exit(compiler, asked, writing)
    os.close(writing)
    told, is_over = _read(reading, time.monotonic() + asked["wall_s"])
    os.close(reading)
    if is_over:
        os.kill(fork, signal.SIGKILL)
    status = os.waitpid(fork, 0)[1]
    if told and not is_over:
        outcome: Outcome = json.loads(told)
        return outcome
    if is_over or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in TOO_SLOW):
        return {"is": SLOW}
    return {"is": LARGE}  # an allocation failed, the stack overflowed, or the system was out of memory


def _read(reading: int, until: float) -> tuple[bytes, bool]:
    """What a fork writes before it ends, and whether it did not end in time, or nobody waits for it any more."""
    told = b""
    asking = sys.stdin.fileno()  # no line comes before the answer, so what can be read is its end
    while ready := select.select([reading, asking], [], [], max(0.0, until - time.monotonic()))[0]:
        if asking in ready:
            break
        more = os.read(reading, 1 << 16)
        if not more:
            return told, False
        told += more
    return told, True


def _compile_and_exit(compiler: Any, asked: dict[str, Any], writing: int) -> None:
    """In the fork: compiles within the limits, writes what became of the constraint, and ends."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        most = used + asked["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_PROF, asked["cpu_s"])
        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=lambda: os.write(writing, json.dumps(_compiled(compiler, asked)).encode()))
        thread.start()
        thread.join()
    finally:
        os._exit(0)


def _compiled(compiler: Any, asked: dict[str, Any]) -> Outcome:
    text = asked["text"]
    try:
        began = time.process_time()
        match asked["kind"]:
            case "json":
                grammar = xgrammar.Grammar.from_json_schema(text, any_whitespace=asked["any_whitespace"])
            case "regex":
                grammar = xgrammar.Grammar.from_regex(text)
            case "grammar" | "choice":
                grammar = xgrammar.Grammar.from_ebnf(text)
        if time.process_time() - began > asked["parse_s"]:
            return {"is": SLOW}
        compiled = compiler.compile_grammar(grammar)
        return {"is": _walked(compiled, asked["step_s"]), "bytes": compiled.memory_size_bytes}
    except MemoryError:
        return {"is": LARGE}
    except Exception as error:  # the compiler raises any type
        words = str(error).strip().split("\n")[0]
        if "bad_alloc" in words:
            return {"is": LARGE}
        return {"is": BAD, "words": PLACE.sub("", words)[:MAX_WORDS]}


def _walked(compiled: Any, most_s: float) -> str:
    """What a few texts that follow the constraint meet: OK, a token that takes more than `most_s`, or none at all."""
    size = compiled.tokenizer_info.vocab_size
    choose = random.Random(size)
    for walk in range(WALKS):
        matcher = xgrammar.GrammarMatcher(compiled)
        mask = xgrammar.allocate_token_bitmask(1, size)
        for _ in range(STEPS):
            began = time.process_time()
            if walk % 2:  # else a place in what is forced that no token has would be passed over
                with contextlib.suppress(UnicodeDecodeError):  # what is forced ends within a character
                    matcher.accept_string(matcher.find_jump_forward_string())
            matcher.fill_next_token_bitmask(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[:size])
            if not len(allowed):
                return DEAD
            matcher.accept_token(int(choose.choice(allowed)))
            if time.process_time() - began > most_s:
                return SLOW
            if matcher.is_terminated():
                break
    return OK


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
