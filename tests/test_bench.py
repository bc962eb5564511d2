"""The report of the benchmark: ratios, spreads, and the modes that became slower."""

import re
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.report import as_table, drops, mode_results
from bench.results import numbers
from bench.run import FAILED, check
from bench.service import worsened

ROOT = Path(__file__).parents[1]
README = (ROOT / "bench" / "README.md").read_text()
ROUNDS = [
    {"stock": 100.0, "idle": 99.0, "add_one_layer": 90.0},
    {"stock": 110.0, "idle": 110.0, "add_one_layer": 104.5},
    {"stock": 90.0, "idle": 99.0, "add_one_layer": 88.2},
]
MACHINE = {"dtype": "bfloat16", "graph": "eager", "model": "small", "vector_instructions": "AVX2"}


def slowed(mode, factor):
    return [{**speeds, mode: speeds[mode] * factor} for speeds in ROUNDS]


def results_of(rounds, **machine):
    return {
        "details": {mode: asdict(result) for mode, result in mode_results(rounds).items()},
        "machine": MACHINE | machine,
    }


def test_rounds_continue_until_there_are_enough_of_them_and_time_has_passed():
    assert list(numbers(3, minutes=0)) == [0, 1, 2]
    started = time.monotonic()
    for _ in numbers(3, minutes=0.001):
        time.sleep(0.01)
    assert time.monotonic() - started >= 0.06


def test_ratios_are_taken_within_rounds_and_their_median_over_all_of_them():
    result = mode_results(ROUNDS)["add_one_layer"]
    assert (result.low, result.ratio, result.high) == (0.9, 0.95, 0.98)
    assert result.tokens_per_s == 104.5


def test_a_mode_below_its_target_is_marked_in_the_table():
    lines = {line.split()[0]: line for line in as_table(mode_results(ROUNDS)).splitlines()[1:]}
    assert lines["add_one_layer"].endswith("BELOW TARGET")
    assert not lines["idle"].endswith("BELOW TARGET")


@pytest.mark.parametrize(("factor", "is_drop"), [(1.0, False), (0.95, False), (0.94, True), (1.2, False)])
def test_a_drop_is_a_median_below_every_committed_round(factor, is_drop):
    """The committed median is 0.95, the lowest round 0.90."""
    committed = results_of(ROUNDS)["details"]
    found = drops(mode_results(slowed("add_one_layer", factor)), committed)
    assert [line.split()[0] for line in found] == (["add_one_layer"] if is_drop else [])


def test_stock_and_modes_that_were_not_committed_cannot_drop():
    committed = results_of([{"stock": 100.0, "idle": 99.0}])["details"]
    assert drops(mode_results(slowed("add_one_layer", 0.1)), committed) == []


def test_check_fails_on_a_drop_and_prints_which(capsys):
    assert check(results_of(ROUNDS), results_of(ROUNDS)) == 0
    assert check(results_of(slowed("idle", 0.5)), results_of(ROUNDS)) == FAILED
    assert "idle is at 0.5" in capsys.readouterr().err


def test_check_refuses_to_compare_settings_that_differ(capsys):
    assert check(results_of(ROUNDS, dtype="float32"), results_of(ROUNDS)) == FAILED
    assert "cannot compare: dtype was bfloat16, here it is float32" in capsys.readouterr().err


SERVICE = {
    "through_grpc": 0.99,
    "ttft_added_ms": 2.0,
    "service": {"dtype": "bfloat16", "spread": {"through_grpc": [0.97, 1.01], "ttft_added_ms": [1.5, 2.5]}},
}


@pytest.mark.parametrize(
    ("name", "value", "is_worse"),
    [
        ("through_grpc", 0.97, False),
        ("through_grpc", 0.96, True),
        ("through_grpc", 1.5, False),
        ("ttft_added_ms", 2.5, False),
        ("ttft_added_ms", 2.6, True),
        ("ttft_added_ms", 0.1, False),
    ],
)
def test_results_of_the_service_worsen_in_their_own_direction(name, value, is_worse):
    worse = worsened("service", {**SERVICE, name: value}, SERVICE)
    assert [line.split()[0] for line in worse] == ([name] if is_worse else [])


def test_the_page_names_the_benchmarks_that_make_bench_runs():
    target = re.search(r"^bench: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    table = README.split("`make bench` also runs these")[1].split("These run by hand")[0]
    assert set(re.findall(r"-m (bench\.\w+)", target[1])) == set(re.findall(r"-m (bench\.\w+)", table))


def test_the_page_names_every_file_of_the_folder():
    tree = README.split("## Where things are")[1]
    files = {path.name for path in (ROOT / "bench").glob("*.py") if not path.name.startswith("__")}
    assert files - set(re.findall(r"\w+\.py", tree)) == set()
