"""Compares throughput with stock vLLM: both engines are loaded and take turns, round after round."""

import argparse
import datetime
import itertools
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from bench.child import OURS
from bench.load import MODES, PROMPT_TOKENS, REQUESTS, STOCK, Batch, Timing
from bench.process import Child, ChildFailed
from bench.report import ModeResult, Round, as_table, drops, mode_results
from bench.results import add_minutes, add_to, numbers
from steer_service.core.errors import SteerError
from steer_service.hf.bundled_model import NAME, ensure_bundled_model

RESULTS = Path(__file__).with_name("results.json")
ROUNDS = 5
TOKENS = 32
DTYPE = "bfloat16"
WARM_UP_TOKENS = 4
"""Tokens of each request in the two warm-up batches of a mode: enough for all work that is done only once."""

SETTLE_S = 1.5
"""Pause before every run: vLLM's workers spin for a second after their last step before they sleep."""

IDLE_CPU_LIMIT = 0.05
"""Cores that children may use while it is not their turn; above this the results are not reliable."""

FAILED = 1
INTERRUPTED = 130
"""Exit status after Ctrl-C, the convention of shells: 128 + SIGINT."""


class Turns:
    """The children: one works at a time, and the others are watched for idleness."""

    def __init__(self, children: Mapping[str, Child], at_work: Callable[[str], tuple[str, ...]]) -> None:
        self.idle_cores = 0.0
        """The most cores that children used during a run that was not their turn."""
        self._children = children
        self._at_work = at_work
        """Name of a turn -> the children that it keeps busy; the first gets the batch."""
        self._numbers: Iterator[int] = itertools.count()

    def take(self, name: str, mode: str, max_tokens: int, **load: Any) -> Timing:
        """Runs one batch of `mode`, with new prompts, in the turn of this name."""
        return self.run(name, Batch(mode=mode, number=next(self._numbers), max_tokens=max_tokens, **load))

    def run(self, name: str, batch: Batch) -> Timing:
        """Runs this batch in the turn of this name."""
        time.sleep(SETTLE_S)
        at_work = self._at_work(name)
        idle = [child for kind, child in self._children.items() if kind not in at_work]
        started, used_before = time.perf_counter(), _cpu_seconds(idle)
        timing = self._children[at_work[0]].run(batch)
        cores = (_cpu_seconds(idle) - used_before) / (time.perf_counter() - started)
        self.idle_cores = max(self.idle_cores, cores)
        say(f"{name}: {timing.tokens_per_s:.1f} tokens/s")
        return timing


def kinds_at_work(mode: str) -> tuple[str, ...]:
    """The kind of child that a batch of `mode` keeps busy."""
    return (STOCK,) if mode == STOCK else (OURS,)


def _cpu_seconds(children: Sequence[Child]) -> float:
    return sum(child.cpu_seconds() for child in children)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and writes the results; returns the exit status."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, _exit_by_signal)
    try:
        results = measure(options)
    except (ChildFailed, SteerError, OSError) as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.out is not None:
        add_to(options.out, results)
        say(f"wrote {options.out}")
    return check(results, json.loads(RESULTS.read_text())) if options.check else 0


def check(results: Mapping[str, Any], committed: Mapping[str, Any]) -> int:
    """Compares with the committed results and prints the modes that became slower; returns the exit status."""
    for fact in ("dtype", "graph", "model", "vector_instructions"):
        if committed["machine"][fact] != results["machine"][fact]:
            say(f"cannot compare: {fact} was {committed['machine'][fact]}, here it is {results['machine'][fact]}")
            return FAILED
    slower = drops({mode: ModeResult(**one) for mode, one in results["details"].items()}, committed["details"])
    for line in slower:
        say(line)
    return FAILED if slower else 0


def _exit_by_signal(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)  # unwinds the stack, which ends the children


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `out` is None if an option makes the run smaller and no file is given."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", type=_modes, default=MODES, metavar="MODE,MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="default: %(default)s")
    add_minutes(parser)
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="per request (default: %(default)s)")
    parser.add_argument("--dtype", choices=(DTYPE, "float32"), default=DTYPE, help="default: %(default)s")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model: minutes on a CPU")
    parser.add_argument(
        "--check", action="store_true", help="fail if a mode is slower than in bench/results.json; writes nothing"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: bench/results.json if no option makes the run smaller"
    )
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="the date in the results (default: today)"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.tokens < 1:
        parser.error("--rounds and --tokens must be positive")
    is_whole = (options.only, options.tokens, options.dtype) == (MODES, TOKENS, DTYPE) and options.rounds >= ROUNDS
    if options.out is None and is_whole and not options.check:
        options.out = RESULTS
    return options


def _modes(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    for mode in asked:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{mode!r} is not one of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in asked)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Starts the children, warms them up, runs the rounds, ends the children and prints the table."""
    machine = machine_facts(options)
    model = str(ensure_bundled_model(say))
    with ExitStack() as stack:
        children = start_children(stack, model, options)
        turns = Turns(children, kinds_at_work)
        loading_s = warm_up(turns, options.only)
        rounds = [run_round(turns, options, number) for number in numbers(options.rounds, options.minutes)]
        facts = {name: fact for name, fact in children[STOCK].facts.items() if name != "pid"}
        machine |= facts | {"idle_cores": round(turns.idle_cores, 3), "rounds": len(rounds)}
    results = mode_results(rounds)
    print(as_table(results))
    print_notes(machine, loading_s)
    return as_results(results, loading_s, machine)


def machine_facts(options: argparse.Namespace) -> dict[str, Any]:
    """The facts on which the results depend, other than the code."""
    return {
        "date": options.date,
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "model": NAME,
        "dtype": options.dtype,
        "graph": "compiled" if options.compiled else "eager",
        "requests": REQUESTS,
        "prompt_tokens": PROMPT_TOKENS,
        "max_tokens": options.tokens,
    }


def start_children(stack: ExitStack, model: str, options: argparse.Namespace) -> dict[str, Child]:
    """The children by kind; leaving `stack` ends them."""
    flags = ["--dtype", options.dtype, *(["--compiled"] if options.compiled else [])]
    children = {}
    for kind in (STOCK, OURS):
        say(f"starting {kind}")
        children[kind] = stack.enter_context(Child(kind, model, *flags))
    return children


def warm_up(turns: Turns, modes: Sequence[str]) -> float:
    """Runs every mode twice with few tokens; returns the seconds to load the programs of distinct_all_layers."""
    say("warming up")
    loading_s = 0.0
    for mode in dict.fromkeys((STOCK, "idle", *modes)):
        first, second = (turns.take(mode, mode, WARM_UP_TOKENS) for _ in range(2))
        if mode == "distinct_all_layers":
            loading_s = first.seconds - second.seconds
    return loading_s


def run_round(turns: Turns, options: argparse.Namespace, number: int) -> Round:
    """Runs every mode once; odd rounds run backwards, so that a drift does not favour one end of the list."""
    say(f"round {number + 1}")
    lineup = (STOCK, *options.only)
    order = lineup if number % 2 == 0 else lineup[::-1]
    timings = {mode: turns.take(mode, mode, options.tokens) for mode in order}
    return {mode: timings[mode].tokens_per_s for mode in lineup}


def print_notes(machine: Mapping[str, Any], loading_s: float) -> None:
    """Prints the facts that are not in the table."""
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if loading_s:
        print(f"loading the programs of distinct_all_layers, once: {loading_s:.2f} s")
    if machine["idle_cores"] > IDLE_CPU_LIMIT:
        print(f"NOT RELIABLE: engines used up to {machine['idle_cores']} cores while it was not their turn")


def as_results(results: Mapping[str, ModeResult], loading_s: float, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file of results."""
    ratios = {mode: result.ratio for mode, result in results.items() if mode != STOCK}
    details = {mode: asdict(result) for mode, result in results.items()}
    return {**ratios, "loading_s": round(loading_s, 3), "details": details, "machine": dict(machine)}


def say(message: str) -> None:
    """Prints progress on standard error."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
