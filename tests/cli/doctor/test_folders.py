"""Folders that must be writable: the rule of the server's start, in the words of the doctor."""

from pathlib import Path

from steer_service.cli.doctor.findings import Status
from steer_service.cli.doctor.folders import Folder, Use, check_folders, folders_of
from tests.cli.doctor.found import by_check, only

ALL = Use(converts=True, downloads=True, on_gpu=False)
ON_GPU = Use(converts=False, downloads=False, on_gpu=True)


def test_a_folder_that_cannot_be_used_has_a_remedy(tmp_path: Path) -> None:
    bad = tmp_path / "file"
    bad.touch()

    def found(path: Path) -> tuple[str, str]:
        return only(check_folders((Folder(variable="X_DIR", path=path, purpose="kernels"),)))

    assert found(tmp_path) == ("ok", f"{tmp_path} can be written to (kernels)")
    text = (
        f"{bad}/x cannot be used (Not a directory) for kernels; each start uses a temporary folder and compiles again; "
        "mount a writable volume there, such as an emptyDir, or set X_DIR to a folder that this user alone can write "
        "to"
    )
    assert found(bad / "x") == ("warn", text)
    tmp_path.chmod(0o777)
    assert "(other users can write to it)" in found(tmp_path)[1]


def test_variables_choose_the_folders_as_the_server_does(tmp_path: Path) -> None:
    home, cache = {"HOME": "/h"}, {"XDG_CACHE_HOME": "/c"}
    paths = {folder.variable: folder.path for folder in folders_of(home, ALL)}
    assert paths["STEERLLM_CACHE"] == Path("/h/.cache/steerllm")
    moved = {folder.variable: folder.path for folder in folders_of({**home, **cache}, ALL)}
    assert moved["HF_HOME"] == Path("/c/huggingface")
    assert moved["STEERLLM_CACHE"] == Path("/c/steerllm")
    given = {name: str(tmp_path) for name in ("VLLM_CACHE_ROOT", "NUMBA_CACHE_DIR", "HF_HOME", "STEERLLM_CACHE")}
    assert {folder.variable for folder in folders_of(given, ALL)} == {*given, "TMPDIR"}
    assert {folder.path for folder in folders_of(given, ALL) if folder.variable != "TMPDIR"} == {tmp_path}


def test_a_missing_temporary_folder_is_passed_over(tmp_path: Path) -> None:
    found = {folder.variable: folder.path for folder in folders_of({"TMPDIR": str(tmp_path / "none")}, ALL)}
    assert found["TMPDIR"] == Path("/tmp")


def test_what_a_server_does_decides_which_folders_it_needs() -> None:
    purposes = [folder.purpose for folder in folders_of({}, ALL)]
    assert "the converted bundled model" in purposes
    assert "the model, which is downloaded" in purposes
    assert [folder.variable for folder in folders_of({}, ON_GPU)] == ["TMPDIR", "STEERLLM_CACHE"]
    given = {"TRITON_CACHE_DIR": "/t"}
    assert "TRITON_CACHE_DIR" in [folder.variable for folder in folders_of(given, ON_GPU)]
    assert "TRITON_CACHE_DIR" not in [folder.variable for folder in folders_of(given, ALL)]


def test_only_the_temporary_folder_keeps_a_server_from_its_start() -> None:
    severe = [folder.variable for folder in folders_of({}, ALL) if folder.severity is Status.FAIL]
    assert severe == ["TMPDIR"]


def test_the_folders_of_this_machine_have_a_line_each() -> None:
    folders = folders_of({}, ALL)
    assert set(by_check(check_folders(folders))) == {folder.variable for folder in folders}
