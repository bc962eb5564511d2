"""The folder of all caches: where it is, and what makes it unusable, on real file systems."""

import os
import stat
from pathlib import Path

import pytest

from steer_service.core import cache_folder
from steer_service.core.cache_folder import cache_root, code_cache, make_folder, why_not_writable, why_unusable
from tests.shm.private_mounts import on_tmpfs

SCRIPT = """
import json, sys
from pathlib import Path
from steer_service.core.cache_folder import why_unusable
print(json.dumps({"problem": why_unusable(Path(sys.argv[1], "cache", "vllm"))}))
"""


def test_the_folder_follows_the_variable_then_xdg_then_the_home_folder() -> None:
    assert cache_root({"STEERLLM_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/c")
    assert cache_root({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/steerllm")
    assert cache_root({"XDG_CACHE_HOME": "not/absolute", "HOME": "/h"}) == Path("/h/.cache/steerllm")
    assert code_cache("NUMBA_CACHE_DIR", {"STEERLLM_CACHE": "/c"}) == Path("/c/numba")
    assert code_cache("NUMBA_CACHE_DIR", {"STEERLLM_CACHE": "/c", "NUMBA_CACHE_DIR": "/n"}) == Path("/n")


def test_a_read_only_or_full_file_system_is_named(tmp_path: Path) -> None:
    assert on_tmpfs("size=64m", tmp_path, SCRIPT) == {"problem": ""}
    assert on_tmpfs("size=64m,ro", tmp_path, SCRIPT) == {"problem": "Read-only file system"}
    assert on_tmpfs("size=64m,nr_inodes=1", tmp_path, SCRIPT) == {"problem": "No space left on device"}
    assert on_tmpfs("size=1m", tmp_path, SCRIPT) == {"problem": "1 MiB are free, and 32 MiB are needed"}


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_one_above_and_not_made(tmp_path: Path) -> None:
    assert why_unusable(tmp_path / "a" / "b", 0) == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / "file" / "b") == "Not a directory"


def test_a_user_without_a_home_folder_has_no_folder() -> None:
    assert why_unusable(Path("~/.cache/steerllm")) == "the user has no home folder"


def test_only_this_user_may_enter_a_folder_that_is_made(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b", 0) == ""
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    assert make_folder(folder, 0) == "other users can write to it"


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert why_unusable(tmp_path, 0) == "it belongs to another user"


def test_a_group_may_write_only_if_it_is_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "by_umask_002"
    folder.mkdir()
    folder.chmod(0o775)
    monkeypatch.setattr(cache_folder, "_is_private", lambda group: group == folder.stat().st_gid)
    assert why_unusable(folder, 0) == ""
    monkeypatch.setattr(cache_folder, "_is_private", lambda group: False)
    assert why_unusable(folder, 0) == "other users can write to it"
