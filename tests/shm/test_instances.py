"""Whose segments are whose: what dead processes left is removed, and nothing else ever is."""

import fcntl
import os
import signal
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from steer_service.shm import instances
from steer_service.shm.instances import PREFIX, PRIVATE_FOLDER, claim, create_private_folder, lock_path, sweep
from steer_service.shm.segments import SegmentDirectory
from tests.shm.folders import locks_in, segments_in
from tests.shm.owner_processes import APART, BOUND_S, DIE, OWNER, WAIT, dead_owner, done, go_on, line_of, process


def test_the_segments_of_a_process_that_was_killed_are_removed_with_its_lock(tmp_path: Path) -> None:
    assert dead_owner(tmp_path) == segments_in(tmp_path)

    assert sweep(tmp_path) == 3

    assert list(tmp_path.iterdir()) == []


def test_the_first_segment_of_a_process_comes_after_the_sweep(tmp_path: Path) -> None:
    dead_owner(tmp_path)

    segment = SegmentDirectory(path=tmp_path).create(1)

    assert segments_in(tmp_path) == [segment.name]
    assert locks_in(tmp_path) == [lock_path(tmp_path, claim(tmp_path)).name]


def test_private_folders_are_removed_with_their_owner_and_not_before(tmp_path: Path) -> None:
    mine = create_private_folder(tmp_path)
    (mine / "socket").touch()
    stranger = tmp_path / f"{PREFIX}0123456789abcdef-01234567"  # of an instance without a lock file
    stranger.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    script = (
        "from steer_service.shm.instances import create_private_folder\n"
        "theirs = create_private_folder(folder)\n(theirs / 'socket').touch()\n"
        "(theirs / 'link').symlink_to(folder / 'outside')\nsay(theirs)\n"
    )
    with process(tmp_path, script + WAIT) as running:
        theirs = Path(line_of(running))
        assert sweep(tmp_path) == 0
        assert theirs.exists()
        running.kill()
        running.wait(BOUND_S)

        assert sweep(tmp_path) == 1

    assert not theirs.exists()
    assert (mine / "socket").exists()
    assert stranger.exists()
    assert (outside / "file").exists()
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert len(mine.name) == len(PRIVATE_FOLDER)


def test_a_sweep_that_was_killed_is_ended_by_the_next(tmp_path: Path) -> None:
    names = dead_owner(tmp_path)
    with process(tmp_path, "os.unlink = lambda path: os.kill(os.getpid(), signal.SIGKILL)\nsweep(folder)\n") as running:
        assert running.wait(BOUND_S) == -signal.SIGKILL
    assert segments_in(tmp_path) == names

    assert sweep(tmp_path) == 3

    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_that_outlives_the_owner_does_not_keep_its_segments(tmp_path: Path) -> None:
    script = f"{OWNER}child = os.fork()\nif child:\n    say(child)\n    {DIE}else:\n    {WAIT}"
    with process(tmp_path, script) as running:
        line_of(running)
        child = int(line_of(running))
        assert running.wait(BOUND_S) == -signal.SIGKILL
        assert is_alive(child)

        assert sweep(tmp_path) == 3

        assert is_alive(child)
        go_on(running)
    assert list(tmp_path.iterdir()) == []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_segments_of_a_process_that_lives_stay(tmp_path: Path) -> None:
    with process(tmp_path, OWNER + WAIT) as running:
        names = line_of(running).split()
        dead_owner(tmp_path)

        assert sweep(tmp_path) == 3

        assert segments_in(tmp_path) == sorted(names)
        assert len(locks_in(tmp_path)) == 1


def test_one_s_own_segments_stay_and_the_lock_is_kept(tmp_path: Path) -> None:
    segment = SegmentDirectory(path=tmp_path).create(1)

    assert sweep(tmp_path) == 0

    assert segments_in(tmp_path) == [segment.name]
    assert done(tmp_path, "say(sweep(folder))") == "0"
    assert segments_in(tmp_path) == [segment.name]


def test_one_s_own_segments_stay_under_another_name_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "real")

    names = [SegmentDirectory(path=tmp_path / name).create(1).name for name in ("real", "other")]

    assert segments_in(tmp_path / "real") == sorted(names)
    assert len(locks_in(tmp_path / "real")) == 1


def test_files_that_no_dead_process_left_are_not_touched(tmp_path: Path) -> None:
    instance = dead_owner(tmp_path)[0].split("-")[1]
    foreign = [
        "psm_12345678",  # another program's
        "steerllm-0123456789abcdef-0123",  # of an instance without a lock file
        "steerllm.lock",
        "steerllm.0123.lock",
        "steerllm.0123456789ABCDEF.lock",
        f"steerllm{instance}-0123",
        f"{PREFIX}{instance}0-0123",  # its instance only begins like the dead one
        f"x{PREFIX}{instance}-0123",
    ]
    for name in foreign:
        (tmp_path / name).write_text("foreign")
    (tmp_path / f"{PREFIX}{instance}-link").symlink_to(tmp_path / "psm_12345678")
    os.mkfifo(tmp_path / f"{PREFIX}{instance}-pipe")
    (tmp_path / "steerllm.00000000000000aa.lock").symlink_to(tmp_path / "psm_12345678")
    (tmp_path / "steerllm.00000000000000bb.lock").mkdir()
    os.mkfifo(tmp_path / "steerllm.00000000000000cc.lock")
    before = facts_of(tmp_path)

    assert sweep(tmp_path) == 3

    gone = {name for name in before if name not in facts_of(tmp_path)}
    assert all(name.startswith(f"{PREFIX}{instance}-") or name == f"steerllm.{instance}.lock" for name in gone)
    assert len(gone) == 4
    assert facts_of(tmp_path) == {name: facts for name, facts in before.items() if name not in gone}


def facts_of(folder: Path) -> dict[str, tuple[object, ...]]:
    return {
        path.name: (os.lstat(path).st_ino, os.lstat(path).st_mtime_ns, is_file(path) and path.read_bytes())
        for path in folder.iterdir()
    }


def is_file(path: Path) -> bool:
    return stat.S_ISREG(os.lstat(path).st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_user_s_files_are_not_touched(tmp_path: Path) -> None:
    [mine, theirs, _] = dead_owner(tmp_path)
    os.chown(tmp_path / theirs, 65534, 65534)
    other = tmp_path / "steerllm.00000000000000aa.lock"
    other.touch()
    (tmp_path / f"{PREFIX}00000000000000aa-0123").touch()
    os.chown(other, 65534, 65534)

    assert sweep(tmp_path) == 2

    assert segments_in(tmp_path) == sorted([theirs, f"{PREFIX}00000000000000aa-0123"])
    assert mine not in segments_in(tmp_path)
    assert locks_in(tmp_path) == [other.name]


@pytest.mark.parametrize("within", [(), APART], ids=["the outer one", "a third one"])
def test_a_sweep_from_another_pid_namespace_removes_only_what_dead_processes_left(
    within: Sequence[str], tmp_path: Path
) -> None:
    if subprocess.run([*APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make PID namespaces")
    with process(tmp_path, f"say(os.getpid())\n{OWNER}{WAIT}", APART) as running:
        assert line_of(running) == "1"
        names = sorted(line_of(running).split())
        assert done(tmp_path, "say(sweep(folder))", within) == "0"
        assert segments_in(tmp_path) == names

        [first] = psutil.Process(running.pid).children()
        first.kill()
        running.wait(BOUND_S)

    assert done(tmp_path, "say(sweep(folder))", within) == "3"
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    done(tmp_path, OWNER)

    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_that_ends_in_order_removes_nothing_of_its_parent_s(tmp_path: Path) -> None:
    script = f"{OWNER}child = os.fork()\nif child:\n    os.waitpid(child, 0)\n    say('ended')\n    {WAIT}"
    with process(tmp_path, script) as running:
        names = line_of(running).split()
        assert line_of(running) == "ended"

        assert segments_in(tmp_path) == sorted(names)
        assert sweep(tmp_path) == 0


def test_a_forked_process_owns_what_it_creates(tmp_path: Path) -> None:
    script = f"{OWNER}\nif os.fork() == 0:\n    {OWNER}    {DIE}else:\n    os.wait()\n    say('ended')\n    {WAIT}"
    with process(tmp_path, script) as running:
        parents, childs = line_of(running).split(), line_of(running).split()
        assert len({name.split("-")[1] for name in [*parents, *childs]}) == 2
        assert line_of(running) == "ended"

        assert sweep(tmp_path) == 3

        assert segments_in(tmp_path) == sorted(parents)


def test_a_directory_without_locks_is_reported_and_not_retried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)

    with pytest.raises(OSError, match="No locks available"):
        claim(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_fails_does_not_hold_up_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(instances, "sweep", refuse)

    instance = claim(tmp_path)

    assert locks_in(tmp_path) == [lock_path(tmp_path, instance).name]
    assert "cannot search for files of servers that died" in caplog.text


def test_a_sweep_logs_a_count_without_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = dead_owner(tmp_path)

    claim(tmp_path)

    assert "removed 3 files and folders of servers that died" in caplog.text
    assert not any(name in caplog.text for name in names)
