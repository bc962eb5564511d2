"""The runner of the parts: each runs whatever became of those before it, and its result is on disk when it ends."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.on_gpu import part_process
from bench.on_gpu.__main__ import BadUsage, choose, main
from bench.on_gpu.part_results import Outcome, Reading, Target, load
from bench.on_gpu.parts import Part, parts_for
from bench.on_gpu.readings import Unreadable
from bench.on_gpu.runner import Book, run_parts

ROOT = Path(__file__).parents[3]

SLEEPS = "import time; time.sleep(60)"
STARTS_OTHERS = f"""
import subprocess, sys
for options in ({{}}, {{"process_group": 0}}):
    print(subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], **options).pid, flush=True)
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""
"""Starts a process in its own group and one in another, prints their numbers, and takes no notice of SIGTERM."""

READS = "import json, sys; print('results:', sorted(json.load(open(sys.argv[1]))))"


def whole_log(log: str) -> Reading:
    if "unreadable" in log:
        raise Unreadable("nothing was proven")
    return Reading(lines=tuple(log.splitlines()), targets=(Target(what="x", figure="1", target="0", is_met=False),))


def part(program: str, *arguments: str, limit_s: float = 60.0) -> Part:
    return Part(title="A part", command=(sys.executable, "-c", program, *arguments), limit_s=limit_s, read=whole_log)


def run(folder: Path, *parts: Part, total_s: float = 600.0) -> bool:
    numbered = dict(enumerate(parts, start=1))
    book = Book(folder, "Today, here.", {number: one.title for number, one in numbered.items()})
    return run_parts(numbered, book, "a machine", total_s, lambda message: None)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes no notice of SIGTERM is killed at once."""
    monkeypatch.setattr(part_process, "GRACE_S", 0.3)


def test_a_part_that_fails_does_not_keep_the_next_from_running(tmp_path: Path) -> None:
    assert not run(tmp_path, part("print('first'); raise SystemExit(3)"), part("print('second')"))

    first, second = load(tmp_path / "results.json").values()
    assert (first.outcome, first.reason) == (Outcome.FAILED, "its exit status is 3")
    assert (first.reading.lines, first.last_lines) == (("first",), ("first",))
    assert (second.outcome, second.reading.lines, second.last_lines) == (Outcome.PASSED, ("second",), ())


def test_a_log_that_cannot_be_read_fails_its_part_and_no_other(tmp_path: Path) -> None:
    broken = Part(title="Broken", command=part("").command, limit_s=60.0, read=lambda log: {}[log])
    assert not run(tmp_path, part("print('unreadable')"), broken, part("print('third')"))

    first, second, third = load(tmp_path / "results.json").values()
    assert (first.outcome, first.reason) == (Outcome.FAILED, "nothing was proven")
    assert (second.outcome, second.reason) == (Outcome.FAILED, "its log cannot be read: KeyError: ''")
    assert third.outcome is Outcome.PASSED


def test_results_are_on_disk_before_the_next_part_begins(tmp_path: Path) -> None:
    results = str(tmp_path / "results.json")
    assert run(tmp_path, part("print(1)"), part(READS, results))

    assert load(tmp_path / "results.json")[2].reading.lines == ("results: ['1', '2']",)
    assert (tmp_path / "part_2.log").read_text() == "results: ['1', '2']\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "part_1.log",
        "part_2.log",
        "report.md",
        "results.json",
    ]


def test_a_part_over_its_limit_is_ended_with_all_that_it_started(tmp_path: Path, quick: None) -> None:
    assert not run(tmp_path, part(STARTS_OTHERS, limit_s=4.0), part("print('second')"))

    first, second = load(tmp_path / "results.json").values()
    assert first.outcome is Outcome.OVER_LIMIT
    assert 4.0 <= first.seconds < 30.0
    assert second.outcome is Outcome.PASSED
    *pids, ready = first.reading.lines
    assert ready == "ready"
    for pid in pids:
        wait_ended(int(pid))


def test_a_process_that_a_part_leaves_behind_is_ended(tmp_path: Path, quick: None) -> None:
    leaves = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]).pid)"
    assert run(tmp_path, part(leaves))

    (pid,) = load(tmp_path / "results.json")[1].reading.lines
    wait_ended(int(pid))


def test_a_part_that_needs_a_gpu_is_not_run_in_a_rehearsal(tmp_path: Path) -> None:
    on_gpu = Part(title="On a GPU", command=(), limit_s=60.0, read=whole_log)
    assert run(tmp_path, on_gpu, part("print('second')"))

    first, second = load(tmp_path / "results.json").values()
    assert (first.outcome, first.reason) == (Outcome.NOT_RUN, "it needs a GPU")
    assert second.outcome is Outcome.PASSED
    assert [number for number, one in parts_for("cpu").items() if not one.command] == [2]
    assert all(one.command for one in parts_for("cuda").values())


def test_parts_for_which_no_time_is_left_are_not_begun(tmp_path: Path) -> None:
    assert not run(tmp_path, part("print('first')"), total_s=1.0)

    (first,) = load(tmp_path / "results.json").values()
    assert (first.outcome, first.reason) == (Outcome.NOT_RUN, "nothing was left of 1 s")
    assert not (tmp_path / "part_1.log").exists()


def test_results_of_parts_that_are_not_chosen_stay(tmp_path: Path) -> None:
    book = Book(tmp_path, "Today.", {1: "First", 2: "Second"})
    run_parts({1: part("print('first')")}, book, "a machine", 60.0, lambda message: None)
    assert "| 2. Second | not run |" in (tmp_path / "report.md").read_text()

    later = Book(tmp_path, "Tomorrow.", {1: "First", 2: "Second"})
    run_parts({2: part("print('second')")}, later, "a machine", 60.0, lambda message: None)
    text = (tmp_path / "report.md").read_text()
    assert "| 1. First | passed |" in text
    assert "| 2. Second | passed |" in text


def test_all_limits_together_are_below_13_minutes_with_the_time_to_end_each_part() -> None:
    parts = parts_for("cuda").values()
    assert sum(one.limit_s + 2 * part_process.GRACE_S for one in parts) <= 13 * 60


def test_a_run_that_is_stopped_ends_its_part_and_keeps_the_results(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from tests.bench.on_gpu.test_runner import SLEEPS, part, run
from bench.on_gpu.__main__ import exit_by_signal
import signal
signal.signal(signal.SIGTERM, exit_by_signal)
run(Path(sys.argv[1]), part("print('first')"), part("import os; print(os.getpid(), flush=True)\\n" + {SLEEPS!r}))
"""
    runner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, process_group=0)
    try:
        log, deadline = tmp_path / "part_2.log", time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pid = int(log.read_text())
        runner.terminate()
        assert runner.wait(30) == 128 + signal.SIGTERM
    finally:
        runner.kill()
        runner.wait()
    assert not is_running(pid)
    first, second = load(tmp_path / "results.json").values()
    assert (first.outcome, second.outcome) == (Outcome.PASSED, Outcome.NOT_ENDED)


def test_processes_get_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    run(tmp_path, part("import os; print(os.environ['PYTHONPATH'], os.environ['HF_HUB_OFFLINE'])"))
    assert load(tmp_path / "results.json")[1].reading.lines == ("/somewhere 1",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "FOLDER", "--parts", "1,7"], "'7' is not a part; parts are 1, 2, 3, 4"),
        (["--output", "FILE"], "is a file, not a folder"),
        (["--output", "FILE/deeper"], "cannot be made: Not a directory"),
        (["--output", "OTHER"], "has no results of this command; give another folder"),
        (["--output", "FOLDER", "--total", "0"], "--total 0.0 is not above 0"),
        (["--output", "FOLDER", "--device", "tpu"], "invalid choice: 'tpu'"),
        ([], "the following arguments are required: --output"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").touch()
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER/results.json").write_text(json.dumps({"idle": 0.99}))
    given = [str(tmp_path / one) if one.split("/")[0] in ("FOLDER", "FILE", "OTHER") else one for one in arguments]

    assert main(given) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench.on_gpu: ")
    assert message in line


def test_parts_run_in_their_own_order() -> None:
    assert choose("3, 1,3") == (1, 3)
    assert choose("") == (1, 2, 3, 4)
    with pytest.raises(BadUsage, match="'' is not a part"):
        choose("1,")


def wait_ended(pid: int) -> None:
    """Returns once the process has ended: it was killed, which takes a moment on a busy machine."""
    deadline = time.monotonic() + 30.0
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for a process that has ended, also if nobody has waited for it yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
