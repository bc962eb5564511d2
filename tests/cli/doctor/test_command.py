"""`steer doctor` as a command: where packages are broken, beside good ones, and where a check itself fails."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_service.cli.doctor import command
from steer_service.cli.doctor.findings import Finding, findings_of, ok, one_line
from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.cli.main import main
from tests.cli.doctor.test_served_model import write_model

PROGRAM = """
import sys
from steer_service.cli.main import main
status = main(["doctor", *sys.argv[1:]])
assert not [name for name in ("torch", "vllm", "transformers") if name in sys.modules]
sys.exit(status)
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )


def test_it_runs_where_every_engine_is_broken(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "torch.py").write_text("import os; os.abort()")
    (packages / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (packages / "vllm.py").write_text("raise ImportError('undefined symbol: _ZN5torch')")
    (packages / "transformers.py").write_text("raise ImportError('no')")
    found_first = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])

    done = run("--json", str(write_model(tmp_path / "model")), PYTHONPATH=found_first, STEERLLM_GRACE_S="abc")

    assert (done.returncode, done.stderr) == (FAILED, ""), done.stderr
    found = {entry["check"]: (entry["status"], entry["text"]) for entry in json.loads(done.stdout)}
    for check, cause in (
        ("torch", "its import fails: the process was ended by SIGABRT"),
        ("torchvision", "operator torchvision::nms does not exist"),
        ("engine", "undefined symbol: _ZN5torch"),
        ("settings", "STEERLLM_GRACE_S: 'abc' is not a number"),
    ):
        assert found[check][0] == "fail"
        assert cause in found[check][1]
    for check in ("captures", "address", "tls", "tokens"):
        assert found[check] == ("warn", "not checked, since the settings are not valid")
    assert found["python"][0] == found["model"][0] == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_its_imports_too(tmp_path: Path, number: signal.Signals) -> None:
    packages, pipe = tmp_path / "packages", tmp_path / "pipe"
    packages.mkdir()
    os.mkfifo(pipe)
    (packages / "torch.py").write_text(
        f"import threading; file = open({str(pipe)!r}, 'w'); print('x', file=file, flush=True)\n"
        "threading.Event().wait()"
    )
    found_first = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    doctor = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(write_model(tmp_path / "model"))],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": found_first},
        process_group=0,
    )
    with pipe.open() as held:  # by the process that imports torch
        assert held.readline() == "x\n"
        doctor.send_signal(number)
        assert doctor.wait(60) == 128 + number
        assert select.select([held], [], [], 60)[0]
        assert not held.read().strip("x\n"), "its end: nobody holds it any more"


@pytest.mark.slow
@pytest.mark.engine
def test_it_finds_this_environment_fit_to_serve(tmp_path: Path) -> None:
    done = run(str(write_model(tmp_path)), STEERLLM_ADDRESS="127.0.0.1:0")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    for check in (
        "python",
        "vllm",
        "torch",
        "engine",
        "model",
        "memory",
        "captures",
        "TMPDIR",
        "open files",
        "address",
    ):
        assert sum(line[6:].startswith(f"{check}: ") for line in lines) == 1, check


def test_a_check_that_fails_itself_is_a_finding_and_keeps_what_it_found() -> None:
    def check() -> Iterator[Finding]:
        yield ok("memory", "fine")
        raise ZeroDivisionError("division\nby zero")

    first, second = findings_of("memory", check)

    assert (str(first.status), str(second.status)) == ("ok", "fail")
    assert second.text == "the check itself failed, please report it: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("is_json", [False, True])
def test_an_error_of_one_check_ends_no_other(
    is_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(
        command, "_checks", lambda *_: {"a": broken, "b": lambda: [ok("b", "fine")], "c": lambda: [ok("c", "fine")]}
    )

    assert main(["doctor", *(["--json"] if is_json else [])]) == FAILED

    out, err = capsys.readouterr()
    text = "the check itself failed, please report it: RuntimeError: no such thing"
    assert err == ""
    if is_json:
        assert json.loads(out)[0] == {"check": "a", "status": "fail", "text": text}
    else:
        assert out.splitlines() == [f"fail  a: {text}", "ok    b: fine", "ok    c: fine"]


def test_without_a_failure_the_status_is_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_checks", lambda *_: {"b": lambda: [ok("b", "fine")]})
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok    b: fine\n"


def test_a_wrong_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["doctor", "--no-such-option"])
    assert exited.value.code == BAD_USAGE


def test_a_long_text_is_one_line() -> None:
    assert one_line("a\n b" * 200, most=10) == "a ba ba b…"
