"""`steer selftest`: what it prints, and its exit status."""

import subprocess
import sys

import pytest

from steer_service.cli.main import main
from steer_service.engine.worker import device_proof
from steer_service.engine.worker.kernel_proof import KernelFault


def test_this_device_is_proven_for_each_dtype_and_width() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "steer_service.cli", "selftest", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )

    lines = [line for line in answer.stdout.splitlines() if line.startswith("steer: ")]
    assert answer.returncode == 0, answer.stderr
    assert len(lines) == 10
    assert "bfloat16, width 576: 192 rows of the kernel, largest error 0.0" in lines[0]
    assert "right on this CPU, proven in" in lines[-1]


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "torch finds no GPU; `nvidia-smi` shows"),
        ("xpu", "no hooks for devices of type 'xpu'"),
        ("nonsense", "the device 'nonsense' cannot be used: Expected one of cpu, cuda"),
    ],
)
def test_a_device_that_cannot_be_used_is_named(device: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", device]) == 1

    assert words in capsys.readouterr().err


def test_a_fault_ends_with_what_was_found_and_what_to_try(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(*_: object) -> None:
        raise KernelFault("the kernel on cpu: a row of no request was changed")

    monkeypatch.setattr(device_proof, "prove_kernel", faulty)
    assert main(["selftest", "--device", "cpu"]) == 1

    (paragraph,) = capsys.readouterr().err.splitlines()
    assert "a row of no request was changed. Try another version of Triton" in paragraph
