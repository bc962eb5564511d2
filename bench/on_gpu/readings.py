"""Reads the logs of the parts: tables, and figures beside their targets."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from bench.load import STOCK
from bench.on_gpu.part_results import Reading, Target
from bench.report import Round, mode_results

FIGURES = "on_gpu figures: "
"""What bench.on_gpu.conformance prints before its JSON: dtype -> fields of `comparison.Findings`."""

COPY_SHARE = 0.85
"""Of the bandwidth of a plain copy: the least that is good enough."""

MODES = ("idle", "add_one_layer", "distinct_all_layers", "capture_all_layers")
"""The modes of `python -m bench` that are measured."""

MOST_ADDED = {"idle": 0.01, "add_one_layer": 0.01, "distinct_all_layers": 0.01, "capture_all_layers": 0.06}
"""Time per output token, relative to stock vLLM: the most that may be added."""

_PROOF = re.compile(r"steer: (\w+), width (\d+): (\d+) rows .* error ([\d.]+) of the tolerance; .*, (.+)$", re.M)
_PROVEN = re.compile(r"steer: s(teering and capture are right on .+)$", re.M)
_CASE = re.compile(r"^\| (\d+) \| (\d+) \| ([^|]+) \| ([\d.]+) \|(.*)\|$", re.M)
_BATCH = re.compile(r"bench: (?:(round) (\d+)|(\w+): ([\d.]+) tokens/s)$", re.M)
_UNRELIABLE = re.compile(r"^NOT RELIABLE: .+$", re.M)


class Unreadable(Exception):
    """A log has nothing of what it must have."""


def read_selftest(log: str) -> Reading:
    """The log of `steer selftest`."""
    proofs = [match.groups() for match in _PROOF.finditer(log)]
    if not proofs:
        raise Unreadable("nothing was proven")
    proven = _PROVEN.search(log)
    worst = max(float(error) for *_, error, _ in proofs)
    lines = [f"S{proven[1]}.", ""] if proven else []
    lines += ["| dtype | hidden size | rows of the kernel | error / tolerance | passes |", "|---|---|---|---|---|"]
    lines += [f"| {dtype} | {width} | {rows} | {error} | {ways} |" for dtype, width, rows, error, ways in proofs]
    return Reading(
        lines=tuple(lines),
        targets=(
            Target(what="largest error / tolerance", figure=f"{worst:.2f}", target="at most 1", is_met=worst <= 1.0),
        ),
        figures={"is_proven": proven is not None, "worst": worst, "proofs": proofs},
    )


def read_kernel(log: str) -> Reading:
    """The log of `python -m bench.kernel_gpu`; a line of the table for each kind of work, of all sizes."""
    cases = [match.groups() for match in _CASE.finditer(log)]
    idle_us = [float(us) for *_, us, rest in cases if not rest.replace("|", "").strip()]
    shares: dict[str, dict[str, float]] = {}
    for rows, width, program, _, rest in cases:
        if rest.replace("|", "").strip():
            shares.setdefault(program, {})[f"{rows} x {width}"] = float(rest.split("|")[-1])
    if not shares:
        raise Unreadable("no case was measured")
    everything = [share for of_program in shares.values() for share in of_program.values()]
    fast = sum(share >= COPY_SHARE for share in everything)
    lines = [
        "| every row | cases | median of the copy's speed | lowest | at rows x hidden size |",
        "|---|---|---|---|---|",
    ]
    for program, by_size in shares.items():
        slowest = min(by_size, key=by_size.__getitem__)
        lines.append(
            f"| {program} | {len(by_size)} | {median(by_size.values()):.2f} | {by_size[slowest]:.2f} | {slowest} |"
        )
    if idle_us:
        lines += ["", f"A launch that has nothing to do takes {min(idle_us):.1f} to {max(idle_us):.1f} us."]
    return Reading(
        lines=tuple(lines),
        targets=(
            Target(
                what="cases that are fast enough",
                figure=f"{fast} of {len(everything)}; lowest {min(everything):.2f}",
                target=f"all, {COPY_SHARE} of the copy's speed",
                is_met=fast == len(everything),
            ),
        ),
        figures={"of_copy": shares, "idle_us": idle_us},
    )


def read_conformance(log: str) -> Reading:
    """The log of `python -m bench.on_gpu.conformance`; of dtypes that it did not come to there is no line."""
    parts = log.rsplit(FIGURES, 1)
    if len(parts) == 1:
        raise Unreadable("no engine has started")
    found: Mapping[str, Mapping[str, Any]] = json.loads(parts[1].splitlines()[0])
    proofs = [f"{dtype}: {one['proof'] or 'not proven'}." for dtype, one in found.items()]
    lines = [line for proof in proofs for line in (proof, "")]
    columns = "dtype | start, s | proof, s | share | requests | failures | steered rows | worst / tolerance"
    columns += " | told from unsteered | captured rows | median error | worst / bound"
    lines += [f"| {columns} |", "|" + "---|" * 12]
    lines += [f"| {dtype} | {' | '.join(_conformance_columns(one))} |" for dtype, one in found.items()]
    failures = [f"* {dtype}: {line}" for dtype, one in found.items() for line in one["failures"]]
    lines += ["", *failures] if failures else []
    targets = [target for dtype, one in found.items() for target in _conformance_targets(dtype, one)]
    return Reading(lines=tuple(lines), targets=tuple(targets), figures=found)


def _conformance_columns(one: Mapping[str, Any]) -> Iterator[str]:
    yield f"{one['start_s']:.1f}"
    yield f"{one['proof_s']:.2f}"
    yield f"{100 * one['proof_s'] / max(one['start_s'], 0.01):.1f} %"
    yield from (str(one["requests"]), str(len(one["failures"])), str(one["steered_rows"]))
    yield f"{one['steered_worst']:.3f}"
    yield f"{one['told_apart']} of {one['steered_requests']}"
    if one["model_rows"]:
        yield from (str(one["model_rows"]), f"{one['model_median']:.1e}", f"{one['model_worst']:.2f}")
    else:
        yield from ("not compared", "", "")


def _conformance_targets(dtype: str, one: Mapping[str, Any]) -> Iterator[Target]:
    answered = one["requests"] > 0
    yield Target(
        what=f"failures of requests, {dtype}",
        figure=f"{len(one['failures'])} of {one['requests']}",
        target="0",
        is_met=answered and not one["failures"],
    )
    worst = one["steered_worst"]
    yield Target(
        what=f"worst steered row / tolerance, {dtype}",
        figure=f"{worst:.3f}",
        target="at most 1",
        is_met=bool(one["steered_rows"]) and worst <= 1.0,
    )
    yield Target(
        what=f"worst captured row / bound, {dtype}",
        figure=f"{one['model_worst']:.2f}" if one["model_rows"] else "not compared",
        target="at most 1",
        is_met=bool(one["model_rows"]) and one["model_worst"] <= 1.0,
    )


def read_throughput(log: str) -> Reading:
    """The log of `python -m bench`, of the rounds that are complete."""
    rounds = _rounds(log)
    if not rounds:
        raise Unreadable("no round is complete")
    results = mode_results(rounds)
    lines = [
        f"Rounds: {len(rounds)}; medians. Time per output token includes the prompts' share.",
        "",
        "| mode | tokens/s of stock vLLM | low..high | best tokens/s | time per output token | most added |",
        "|---|---|---|---|---|---|",
    ]
    targets = []
    for mode, result in results.items():
        if mode == STOCK:
            lines.append(f"| {mode} | 1 | | {result.tokens_per_s:.0f} | | |")
            continue
        added, most = 1.0 / result.ratio - 1.0, MOST_ADDED[mode]
        lines.append(
            f"| {mode} | {result.ratio:.3f} | {result.low:.3f}..{result.high:.3f} | {result.tokens_per_s:.0f} "
            f"| {added:+.1%} | {most:+.0%} |"
        )
        targets.append(
            Target(
                what=f"time per output token, {mode}",
                figure=f"{added:+.1%}",
                target=f"at most {most:+.0%}",
                is_met=added <= most,
            )
        )
    lines += ["", *_UNRELIABLE.findall(log)] if _UNRELIABLE.search(log) else []
    return Reading(lines=tuple(lines), targets=tuple(targets), figures={"rounds": rounds})


def _rounds(log: str) -> Sequence[Round]:
    """Mode -> tokens/s of each round in which all modes were run."""
    rounds: list[dict[str, float]] = []
    is_warm = False
    for number, _, mode, speed in (match.groups() for match in _BATCH.finditer(log)):
        if number:
            is_warm = True
            rounds.append({})
        elif is_warm:
            rounds[-1][mode] = float(speed)
    order = (STOCK, *MODES)
    return [{mode: one[mode] for mode in order} for one in rounds if set(one) == set(order)]
