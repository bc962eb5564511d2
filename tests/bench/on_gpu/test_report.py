"""What the report says of the logs of the parts."""

from collections.abc import Mapping

import pytest

from bench.on_gpu.part_results import Outcome, PartResult, Reading, load, save
from bench.on_gpu.readings import (
    Unreadable,
    read_conformance,
    read_kernel,
    read_selftest,
    read_throughput,
)
from bench.on_gpu.report import report

SELFTEST = """\
steer: bfloat16, width 576: 192 rows of the kernel, largest error 0.31 of the tolerance; order and emptying of \
passes, called and replayed from a graph
steer: float32, width 8192: 192 rows of the kernel, largest error 0.02 of the tolerance; order and emptying of \
passes, called
steer: steering and capture are right on NVIDIA H200, proven in 8.1 s
"""

KERNEL = """\
NVIDIA H200, torch 2.11.0, bfloat16, hidden and residual

| rows | hidden size | every row | us | GB/s | copy, us | copy, GB/s | of the copy's speed |
|---|---|---|---|---|---|---|---|
| 32 | 1024 | idle | 1.9 | | | | |
| 32 | 1024 | 1 add | 3.2 | 90 | 3.0 | 100 | 0.90 |
| 256 | 1024 | 1 add | 3.2 | 85 | 3.0 | 100 | 0.85 |
| 32 | 1024 | 1 cap + capture | 3.2 | 80 | 3.0 | 100 | 0.80 |
"""

CONFORMANCE = """\
Loading weights:  10%
on_gpu figures: {"bfloat16": {"start_s": 40.0}}
Loading weights:  41%
on_gpu figures: {"bfloat16": {"start_s": 40.0, "proof": "proven on NVIDIA H200", "proof_s": 2.0, "requests": 50, \
"failures": ["request 7 (a cap): wrong"], "steered_rows": 700, "steered_worst": 0.25, "steered_requests": 45, \
"told_apart": 45, "model_rows": 2000, "model_median": 0.012, "model_worst": 0.5}, "float32": {"start_s": 30.0, \
"proof": "proven", "proof_s": 0.3, "requests": 0, "failures": [], "steered_rows": 0, "steered_worst": 0.0, \
"steered_requests": 0, "told_apart": 0, "model_rows": 0, "model_median": 0.0, "model_worst": 0.0}}
INFO shutting down
"""

THROUGHPUT = """\
bench: warming up
bench: stock: 50.0 tokens/s
bench: round 1
bench: stock: 1000.0 tokens/s
bench: idle: 1000.0 tokens/s
bench: add_one_layer: 995.0 tokens/s
bench: distinct_all_layers: 980.0 tokens/s
bench: capture_all_layers: 950.0 tokens/s
bench: round 2
bench: capture_all_layers: 950.0 tokens/s
"""


def met(reading: Reading) -> Mapping[str, tuple[str, bool]]:
    return {target.what: (target.figure, target.is_met) for target in reading.targets}


def test_the_proof_of_a_device_has_a_line_for_each_dtype_and_hidden_size() -> None:
    reading = read_selftest(SELFTEST)
    assert reading.lines[0] == "Steering and capture are right on NVIDIA H200, proven in 8.1 s."
    assert reading.lines[-2:] == (
        "| bfloat16 | 576 | 192 | 0.31 | called and replayed from a graph |",
        "| float32 | 8192 | 192 | 0.02 | called |",
    )
    assert met(reading) == {"largest error / tolerance": ("0.31", True)}


def test_the_kernel_is_fast_enough_if_every_case_is() -> None:
    reading = read_kernel(KERNEL)
    assert "| 1 add | 2 | 0.88 | 0.85 | 256 x 1024 |" in reading.lines
    assert reading.lines[-1] == "A launch that has nothing to do takes 1.9 to 1.9 us."
    assert met(reading) == {"cases that are fast enough": ("2 of 3; lowest 0.80", False)}
    assert met(read_kernel(KERNEL.replace("0.80", "0.86"))) == {
        "cases that are fast enough": ("3 of 3; lowest 0.85", True)
    }


def test_conformance_is_what_was_known_last_and_a_dtype_without_answers_meets_no_target() -> None:
    reading = read_conformance(CONFORMANCE)
    assert reading.lines[0] == "bfloat16: proven on NVIDIA H200."
    assert (
        "| bfloat16 | 40.0 | 2.00 | 5.0 % | 50 | 1 | 700 | 0.250 | 45 of 45 | 2000 | 1.2e-02 | 0.50 |" in reading.lines
    )
    assert reading.lines[-1] == "* bfloat16: request 7 (a cap): wrong"
    assert met(reading) == {
        "failures of requests, bfloat16": ("1 of 50", False),
        "worst steered row / tolerance, bfloat16": ("0.250", True),
        "worst captured row / bound, bfloat16": ("0.50", True),
        "failures of requests, float32": ("0 of 0", False),
        "worst steered row / tolerance, float32": ("0.000", False),
        "worst captured row / bound, float32": ("not compared", False),
    }


def test_throughput_is_that_of_complete_rounds_after_the_warm_up() -> None:
    reading = read_throughput(THROUGHPUT)
    assert reading.lines[0].startswith("Rounds: 1;")
    assert "| idle | 1.000 | 1.000..1.000 | 1000 | +0.0% | +1% |" in reading.lines
    assert met(reading) == {
        "time per output token, idle": ("+0.0%", True),
        "time per output token, add_one_layer": ("+0.5%", True),
        "time per output token, distinct_all_layers": ("+2.0%", False),
        "time per output token, capture_all_layers": ("+5.3%", True),
    }
    unreliable = read_throughput(THROUGHPUT + "NOT RELIABLE: engines used up to 0.2 cores\n")
    assert unreliable.lines[-1] == "NOT RELIABLE: engines used up to 0.2 cores"


@pytest.mark.parametrize("read", [read_selftest, read_kernel, read_conformance, read_throughput])
def test_a_log_that_says_nothing_is_unreadable(read) -> None:
    with pytest.raises(Unreadable):
        read("Traceback (most recent call last):\n")


def test_the_report_lists_each_part_with_its_outcome_and_targets() -> None:
    passed = PartResult(
        outcome=Outcome.PASSED,
        began="2026-12-01 10:41",
        machine="NVIDIA H200, torch 2.11.0",
        command="python -m bench.kernel_gpu",
        seconds=31.4,
        limit_s=80.0,
        reading=read_kernel(KERNEL),
    )
    over = PartResult(outcome=Outcome.OVER_LIMIT, seconds=90.0, limit_s=80.0, last_lines=("loading", "compiling"))
    titles = {1: "The device", 2: "The kernel", 3: "Real vLLM", 4: "Throughput"}

    text = report("2026-12-01 10:40, NVIDIA H200.", titles, {2: passed, 3: over})

    assert text.startswith("# steerllm on a GPU\n\n2026-12-01 10:40, NVIDIA H200.\n")
    assert "| 1. The device | not run | | |  |" in text
    assert "| 2. The kernel | passed | 31 | 80 | 0 of 1 |" in text
    assert "| 3. Real vLLM | ended at its time limit | 90 | 80 | not known |" in text
    assert "| cases that are fast enough | 2 of 3; lowest 0.80 | all, 0.85 of the copy's speed | NO |" in text
    assert "Passed. Begun 2026-12-01 10:41; NVIDIA H200, torch 2.11.0.\nLog: `part_2.log`." in text
    assert "```text\nloading\ncompiling\n```" in text
    assert "## 1." not in text


def test_results_come_back_from_their_file(tmp_path) -> None:
    result = PartResult(outcome=Outcome.FAILED, reason="why", reading=read_selftest(SELFTEST), last_lines=("end",))
    save(tmp_path / "results.json", {1: result})
    (back,) = load(tmp_path / "results.json").values()
    assert (back.outcome, back.reason, back.last_lines) == (result.outcome, result.reason, result.last_lines)
    assert (back.reading.lines, back.reading.targets) == (result.reading.lines, result.reading.targets)
