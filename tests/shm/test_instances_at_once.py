"""Processes that claim and sweep at the same time lose nothing."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from steer_service.shm import instances
from steer_service.shm.instances import claim, lock_path, sweep
from steer_service.shm.segments import SegmentDirectory
from tests.shm.folders import locks_in, segments_in
from tests.shm.owner_processes import BOUND_S, OWNER, WAIT, done, go_on, line_of, process


def test_of_two_sweeps_at_once_each_segment_is_removed_by_one(tmp_path: Path) -> None:
    with ExitStack() as stack:  # of one after the other, the next would remove what the one before left
        owners = [stack.enter_context(process(tmp_path, OWNER + WAIT)) for _ in range(3)]
        assert [len(line_of(owner).split()) for owner in owners] == [3, 3, 3]
    script = "say('ready')\nsys.stdin.readline()\nsay(sweep(folder))\n"
    with ExitStack() as stack:
        sweepers = [stack.enter_context(process(tmp_path, script)) for _ in range(2)]
        for sweeper in sweepers:
            assert line_of(sweeper) == "ready"
        for sweeper in sweepers:
            go_on(sweeper)
        removed = [int(line_of(sweeper)) for sweeper in sweepers]
        assert [sweeper.wait(BOUND_S) for sweeper in sweepers] == [0, 0]

    assert sum(removed) == 9
    assert list(tmp_path.iterdir()) == []


def test_a_claim_is_repeated_if_a_sweep_removes_its_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = instances._lock, []

    def late(descriptor: int) -> bool:
        monkeypatch.setattr(instances, "_lock", lock)
        taken.extend(locks_in(tmp_path))
        done(tmp_path, "sweep(folder)")
        return lock(descriptor)

    monkeypatch.setattr(instances, "_lock", late)
    segment = SegmentDirectory(path=tmp_path).create(1)

    assert len(taken) == 1
    assert len(locks_in(tmp_path)) == 1
    assert locks_in(tmp_path) != taken
    done(tmp_path, "sweep(folder)")
    assert segments_in(tmp_path) == [segment.name]


def test_a_claim_is_repeated_if_a_sweep_has_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = instances._lock
    script = (
        "import fcntl\nfile = open(next(folder.iterdir()), 'r+')\nfcntl.lockf(file, fcntl.LOCK_EX)\nsay(1)\n" + WAIT
    )
    with ExitStack() as stack:

        def busy(descriptor: int) -> bool:
            monkeypatch.setattr(instances, "_lock", lock)
            line_of(stack.enter_context(process(tmp_path, script)))
            return lock(descriptor)

        monkeypatch.setattr(instances, "_lock", busy)
        instance = claim(tmp_path)

        assert len(locks_in(tmp_path)) == 2  # the other will be removed by whoever locked it, or the next sweep
    done(tmp_path, "sweep(folder)")
    assert locks_in(tmp_path) == [lock_path(tmp_path, instance).name]


def test_processes_that_come_while_others_sweep_lose_nothing(tmp_path: Path) -> None:
    claims = """
def lives():
    segment = directory.create(1)
    lock = lock_path(folder, claim(folder))
    return all((folder / segment.name).exists() and lock.exists() for _ in range(200))

for _ in range(100):
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if lives() else 1)  # and leaves its segment to be swept
        finally:
            os._exit(2)
    say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
say("end")
"""
    with process(tmp_path, "while True: sweep(folder)") as _, process(tmp_path, claims) as claimers:
        said = list(iter(lambda: line_of(claimers), "end"))

    assert said == ["0"] * 100
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
