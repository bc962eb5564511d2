"""vLLM's processes end with their exit handlers and their exit status, and without Python's teardown."""

import atexit
import multiprocessing
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from steer_service.engine.vllm_patches import quick_end
from steer_service.engine.vllm_patches.quick_end import skip_teardown

BOUND_S = 60.0


class Kept:
    """Writes a file when Python's teardown destroys this module."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "torn down"
        self._open = open

    def __del__(self) -> None:
        self._open(self._path, "w").close()


def process_of_vllm(folder: Path, error: type[BaseException] | None, *, shuts_down: bool) -> None:
    """What vLLM does in a process: whatever ends it, it shuts down first."""
    atexit.register((folder / "handled").touch)
    sys.kept = Kept(folder)  # type: ignore[attr-defined]
    try:
        if error is not None:
            raise error
    finally:
        if shuts_down:
            skip_teardown()


def ended(name: str, folder: Path, error: type[BaseException] | None = None, *, shuts_down: bool = True) -> int:
    process = multiprocessing.get_context("spawn").Process(
        target=process_of_vllm, name=name, args=(folder, error), kwargs={"shuts_down": shuts_down}
    )
    process.start()
    process.join(BOUND_S)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("name", ["EngineCore", "EngineCore_DP0", "VllmWorker-0"])
def test_a_process_of_vllm_ends_after_its_exit_handlers(name: str, tmp_path: Path) -> None:
    assert ended(name, tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["handled"]


@pytest.mark.parametrize(("error", "status"), [(SystemExit, 0), (ValueError, 1)])
def test_its_exit_status_says_whether_an_error_ended_it(
    error: type[BaseException], status: int, tmp_path: Path
) -> None:
    assert ended("EngineCore", tmp_path, error) == status


@pytest.mark.parametrize(("name", "shuts_down"), [("EngineCore", False), ("Process-1", True)])
def test_another_process_is_torn_down(name: str, *, shuts_down: bool, tmp_path: Path) -> None:
    assert ended(name, tmp_path, shuts_down=shuts_down) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"handled", "torn down"}


def test_the_process_of_the_user_keeps_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def registered(*_: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(quick_end.atexit, "register", registered)
    skip_teardown()
