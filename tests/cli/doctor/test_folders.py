"""Folders that must be writable, on real read-only and full file systems."""

from pathlib import Path

from steer_service.cli.doctor.findings import Status
from steer_service.cli.doctor.folders import Folder, Use, check_folders, folders_of, why_not_writable
from tests.cli.doctor.found import by_check, only
from tests.shm.private_mounts import on_tmpfs

SCRIPT = """
import json, sys
from pathlib import Path
from steer_service.cli.doctor.folders import why_not_writable
print(json.dumps({"problem": why_not_writable(Path(sys.argv[1], "cache", "vllm"))}))
"""


def test_a_read_only_or_full_file_system_is_named(tmp_path: Path) -> None:
    assert on_tmpfs("size=1m", tmp_path, SCRIPT) == {"problem": ""}
    assert on_tmpfs("size=1m,ro", tmp_path, SCRIPT) == {"problem": "Read-only file system"}
    assert on_tmpfs("size=1m,nr_inodes=1", tmp_path, SCRIPT) == {"problem": "No space left on device"}


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_one_above_and_not_made(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "a" / "b") == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / "file" / "b") == "Not a directory"


def test_one_writable_folder_of_several_is_enough(tmp_path: Path) -> None:
    bad = tmp_path / "file"
    bad.touch()

    def found(*paths: Path) -> tuple[str, str]:
        folder = Folder(variable="X_DIR", paths=paths, purpose="kernels", severity=Status.FAIL)
        return only(check_folders((folder,)))

    assert found(bad, tmp_path) == ("ok", f"{tmp_path} is writable (kernels)")
    status, text = found(bad)
    assert status == "fail"
    assert text.startswith(f"{bad} is not writable (Not a directory), for kernels; mount a writable volume there")
    assert text.endswith("or set X_DIR to a writable folder")


ALL = Use(converts=True, downloads=True, compiles=True, on_gpu=False)
ON_GPU = Use(converts=False, downloads=False, compiles=False, on_gpu=True)


def test_variables_choose_the_folders_as_in_the_libraries(tmp_path: Path) -> None:
    home, cache = {"HOME": "/h"}, {"XDG_CACHE_HOME": "/c"}
    paths = {folder.variable: folder.paths[-1] for folder in folders_of(home, ALL)}
    assert paths["VLLM_CACHE_ROOT"] == Path("/h/.cache/vllm")
    assert paths["STEERLLM_CACHE"] == Path("/h/.cache/steerllm")
    assert paths["TMPDIR"] == Path("/tmp")
    moved = {folder.variable: folder.paths[-1] for folder in folders_of({**home, **cache}, ALL)}
    assert moved["HF_HOME"] == Path("/c/huggingface")
    assert moved["NUMBA_CACHE_DIR"] == Path("/c/numba")
    assert moved["STEERLLM_CACHE"] == Path("/h/.cache/steerllm")
    given = {name: str(tmp_path / name) for name in paths}
    for folder in folders_of(given, ALL):
        assert folder.paths == (tmp_path / folder.variable,)


def test_what_a_server_does_decides_which_folders_it_needs() -> None:
    needed = {folder.variable: folder.severity for folder in folders_of({}, ALL)}
    assert needed["VLLM_CACHE_ROOT"] is needed["NUMBA_CACHE_DIR"] is needed["HF_HOME"] is Status.FAIL
    assert needed["STEERLLM_CACHE"] is Status.FAIL
    others = {folder.variable: folder.severity for folder in folders_of({}, ON_GPU)}
    assert others["VLLM_CACHE_ROOT"] is Status.WARN
    assert set(others) - set(needed) == {"TRITON_CACHE_DIR"}
    assert set(needed) - set(others) == {"STEERLLM_CACHE", "HF_HOME", "NUMBA_CACHE_DIR"}


def test_the_folders_of_this_machine_have_a_line_each() -> None:
    folders = folders_of({}, ALL)
    assert list(by_check(check_folders(folders))) == [folder.variable for folder in folders]
