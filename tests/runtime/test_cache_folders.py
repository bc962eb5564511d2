"""Every cache of a process gets a folder that can be written to, in processes of their own."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os
from steer_service.core.errors import EngineFailed
from steer_service.runtime.cache_folders import use_cache_folders
try:
    first, second = use_cache_folders(), use_cache_folders()
    modes = {name: os.stat(os.environ[name]).st_mode for name in os.environ if name.endswith(("CACHE_DIR", "_ROOT"))}
    print(json.dumps({"first": first, "second": second, "environment": dict(os.environ), "modes": modes}))
except EngineFailed as error:
    print(json.dumps({"error": error.message, "reason": error.reason}))
"""


def answer_of(**environment: str) -> dict[str, object]:
    command = [sys.executable, "-c", SCRIPT]
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True, timeout=60)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.fixture
def unwritable(tmp_path: Path) -> str:
    """A path below a file: not even root can make a folder there."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "home")


def test_all_caches_are_in_one_folder_of_this_user(tmp_path: Path) -> None:
    found = answer_of(HOME=str(tmp_path))
    root = tmp_path / ".cache" / "steerllm"
    assert found["first"] == []
    environment = found["environment"]
    assert isinstance(environment, dict)
    assert environment["VLLM_CACHE_ROOT"] == str(root / "vllm")
    assert environment["NUMBA_CACHE_DIR"] == str(root / "numba")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(root / "torchinductor")
    assert environment["TRITON_CACHE_DIR"] == str(root / "triton")
    assert not {"HF_HOME", "MPLCONFIGDIR"} & set(environment)
    modes = found["modes"]
    assert isinstance(modes, dict)
    assert {stat.S_IMODE(mode) for mode in modes.values()} == {0o700}


def test_a_folder_that_the_user_chose_stays(tmp_path: Path) -> None:
    chosen = str(tmp_path / "mine")
    environment = answer_of(HOME=str(tmp_path), NUMBA_CACHE_DIR=chosen)["environment"]
    assert isinstance(environment, dict)
    assert environment["NUMBA_CACHE_DIR"] == chosen


def test_without_a_writable_home_a_temporary_folder_serves_and_is_removed(tmp_path: Path, unwritable: str) -> None:
    found = answer_of(HOME=unwritable, TMPDIR=str(tmp_path))
    assert found["second"] == []
    sentence = (
        f"{unwritable}/.cache/steerllm cannot be used for caches (Not a directory): a temporary folder is used, and "
        "the next start compiles again. Set STEERLLM_CACHE to a folder that this user alone can write to"
    )
    assert found["first"] == [sentence]
    environment = found["environment"]
    assert isinstance(environment, dict)
    names = ("VLLM_CACHE_ROOT", "NUMBA_CACHE_DIR", "HF_HOME", "MPLCONFIGDIR")
    assert {Path(environment[name]).parents[1] for name in names} == {tmp_path}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bad_folder_of_one_library_is_replaced_and_named(tmp_path: Path, unwritable: str) -> None:
    found = answer_of(HOME=str(tmp_path), TMPDIR=str(tmp_path), VLLM_CACHE_ROOT=unwritable)
    sentence = (
        f"VLLM_CACHE_ROOT: {unwritable} cannot be used (Not a directory); a temporary folder is used. Set "
        "VLLM_CACHE_ROOT to a folder that this user alone can write to"
    )
    assert found["first"] == [sentence]


def test_a_temporary_folder_that_is_missing_is_not_needed(tmp_path: Path) -> None:
    assert answer_of(HOME=str(tmp_path), TMPDIR=str(tmp_path / "none"))["first"] == []
