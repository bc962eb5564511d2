"""The pool: bytes are counted before they are spent, given back on every way out, and a full system is said to be."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import OverBudget, Overloaded
from steer_service.core.usage import MemoryUsage
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import Segment, SegmentDirectory
from tests.shm.folders import no_more_files, segments_in
from tests.shm.private_mounts import on_tmpfs

BUDGET = 100_000


@contextmanager
def segment_of(pool: SegmentPool, size: int, client_id: str = "") -> Iterator[Segment]:
    segment = pool.acquire(size, client_id)
    try:
        yield segment
    finally:
        pool.release(segment)


@contextmanager
def in_time(take: Callable[[], AbstractContextManager[Segment]]) -> Iterator[None]:
    """Enters what `take` gives in another thread, where waiting for ever can be told."""
    block, done = ExitStack(), threading.Event()

    def enter() -> None:
        block.enter_context(take())
        done.set()

    threading.Thread(target=enter, daemon=True).start()
    assert done.wait(10), "it waits for itself"
    with block:
        yield


def test_a_segment_exists_for_its_block_only(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))

    with segment_of(pool, 1000) as segment:
        assert segments_in(tmp_path) == [segment.name]
        assert segment.size == pool.reserved_bytes == 1000

    assert segments_in(tmp_path) == []
    assert pool.reserved_bytes == 0


def test_an_error_in_the_block_gives_everything_back(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))

    with pytest.raises(KeyError), segment_of(pool, 1000):
        raise KeyError

    assert segments_in(tmp_path) == []
    assert pool.reserved_bytes == 0


def test_a_name_that_was_removed_already_is_not_an_error(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))

    with segment_of(pool, 1000) as segment:
        os.unlink(tmp_path / segment.name)

    assert pool.reserved_bytes == 0


@given(st.lists(st.one_of(st.integers(1, BUDGET), st.just(None)), max_size=20))
def test_the_budget_is_never_exceeded_and_never_refuses_what_fits(steps: list[int | None]) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as blocks:
        pool = SegmentPool(BUDGET, SegmentDirectory(path=Path(folder)))
        taken: list[tuple[ExitStack, int]] = []
        for size in steps:
            if size is None:  # the oldest goes
                if taken:
                    taken.pop(0)[0].close()
            elif size <= BUDGET - sum(bytes_ for _, bytes_ in taken):
                block = blocks.enter_context(ExitStack())
                block.enter_context(segment_of(pool, size))
                taken.append((block, size))
            else:
                with pytest.raises(Overloaded), segment_of(pool, size):
                    pass
            assert pool.reserved_bytes == sum(bytes_ for _, bytes_ in taken) <= BUDGET
        blocks.close()
        assert pool.reserved_bytes == 0


def test_a_spent_budget_is_refused_with_the_numbers_and_a_delay(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))

    with segment_of(pool, 90_000):
        with (
            pytest.raises(OverBudget, match="20000 bytes of capture memory asked for, 10000 of 100000 left") as raised,
            segment_of(pool, 20_000),
        ):
            pass
        assert len(segments_in(tmp_path)) == 1

    assert (raised.value.asked_bytes, raised.value.allowed_bytes) == (20_000, 10_000)
    assert raised.value.reason == "SHM_SPACE"
    assert raised.value.retry_after_s is not None


def test_a_retry_is_not_advised_for_a_size_that_can_never_fit(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))

    with pytest.raises(Overloaded, match="100001 bytes") as raised, segment_of(pool, BUDGET + 1):
        pass

    assert raised.value.retry_after_s is None


def test_other_errors_are_not_reported_as_lack_of_space(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))

    with pytest.raises(OSError) as raised, segment_of(pool, 0):
        pass

    assert not isinstance(raised.value, Overloaded)
    assert pool.reserved_bytes == 0


def test_one_client_cannot_take_the_share_of_others(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path), client_budget_bytes=30_000)

    with segment_of(pool, 20_000, "a"), segment_of(pool, 30_000, "b"), segment_of(pool, 20_000):
        with pytest.raises(OverBudget, match="10000 of 30000 of this client's left") as raised:
            pool.acquire(10_001, "a")
        assert raised.value.retry_after_s is not None
        assert (pool.client_bytes("a"), pool.client_bytes("b")) == (20_000, 30_000)
    with pytest.raises(OverBudget, match="at most 30000 of this client's allowed") as raised:
        pool.acquire(30_001, "a")

    assert raised.value.retry_after_s is None
    assert pool.client_bytes("a") == pool.reserved_bytes == 0


def test_closing_releases_the_rest_and_leaves_mappings(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))
    segment, other = pool.acquire(1000), pool.acquire(2000, "a")
    segment.memory[:4] = b"rows"

    pool.release(other)
    pool.close()
    pool.release(segment)

    assert pool.reserved_bytes == pool.client_bytes("a") == 0
    assert segments_in(tmp_path) == []
    assert segment.memory[:4] == b"rows"


PRELUDE = """
import json, os, sys
from pathlib import Path
from steer_service.core.errors import Overloaded
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory
from tests.shm.folders import segments_in

folder = Path(sys.argv[1])
def outcome(pool, size):
    try:
        segment = pool.acquire(size)
        reserved = pool.reserved_bytes
        pool.release(segment)
        return {"refused": False, "reserved": reserved}
    except Overloaded as error:
        return {
            "refused": True, "message": str(error), "reason": error.reason, "retry_after_s": error.retry_after_s,
            "reserved": pool.reserved_bytes, "left": segments_in(folder),
        }
"""


def tried_on_tmpfs(options: str, folder: Path, script: str) -> dict[str, Any]:
    return on_tmpfs(options, folder, PRELUDE + script)


def test_a_size_over_the_free_space_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    answer = tried_on_tmpfs(
        "size=1m", tmp_path, "print(json.dumps(outcome(SegmentPool(64 << 20, SegmentDirectory(path=folder)), 2 << 20)))"
    )

    assert answer["message"].startswith(f"{2 << 20} bytes of capture memory asked for, at most {1 << 20} allowed")
    assert answer["reason"] == "SHM_SPACE"
    assert answer["retry_after_s"] is None
    assert (answer["reserved"], answer["left"]) == (0, [])


def test_space_that_others_hold_on_the_file_system_counts(tmp_path: Path) -> None:
    script = """
(folder / "others").write_bytes(bytes(512 << 10))
answer = outcome(SegmentPool(64 << 20, SegmentDirectory(path=folder)), 768 << 10)
(folder / "others").unlink()
print(json.dumps(answer | {"afterwards": outcome(SegmentPool(64 << 20, SegmentDirectory(path=folder)), 768 << 10)}))
"""
    answer = tried_on_tmpfs("size=1m", tmp_path, script)

    assert answer["message"] == f"{768 << 10} bytes of capture memory asked for, {512 << 10} of {1 << 20} left"
    assert answer["retry_after_s"] is not None
    assert answer["afterwards"] == {"refused": False, "reserved": 768 << 10}


def test_space_lost_between_check_and_creation_is_reported_the_same_way(tmp_path: Path) -> None:
    # Without a free inode there are free bytes, and yet nothing can be created.
    answer = tried_on_tmpfs(
        "size=1m,nr_inodes=1",
        tmp_path,
        "print(json.dumps(outcome(SegmentPool(1 << 20, SegmentDirectory(path=folder)), 4096)))",
    )

    assert answer["refused"]
    assert answer["message"].startswith("4096 bytes of capture memory asked for")
    assert answer["reason"] == "SHM_SPACE"
    assert (answer["reserved"], answer["left"]) == (0, [])


def test_a_segment_that_does_not_fit_is_refused_when_created_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
try:
    SegmentDirectory(path=folder).create(2 << 20)
except Overloaded as error:
    print(json.dumps({"reason": error.reason, "cause": str(error.__cause__), "left": segments_in(folder)}))
"""
    answer = tried_on_tmpfs("size=1m", tmp_path, script)

    assert answer["reason"] == "SHM_SPACE"
    assert "No space left on device" in answer["cause"]
    assert answer["left"] == []


def test_a_tmpfs_without_a_limit_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    answer = tried_on_tmpfs(
        "size=0,nr_inodes=0",
        tmp_path,
        "print(json.dumps(outcome(SegmentPool(1 << 20, SegmentDirectory(path=folder)), 4096)))",
    )

    assert answer == {"refused": False, "reserved": 4096}


def test_without_a_free_descriptor_a_segment_is_refused_for_now(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))

    with no_more_files(), pytest.raises(Overloaded, match="no room") as raised:
        pool.acquire(4096)

    assert raised.value.reason == "SHM_SPACE"
    assert raised.value.retry_after_s is not None
    assert pool.reserved_bytes == 0
    assert list(tmp_path.iterdir()) == []
    with segment_of(pool, 4096):
        assert len(segments_in(tmp_path)) == 1


def test_a_segment_that_the_garbage_collector_releases_meanwhile_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))
    dropped, statvfs = [pool.acquire(60_000)], os.statvfs

    def collecting(path: Path) -> os.statvfs_result:
        while dropped:
            pool.release(dropped.pop())
        return statvfs(path)

    monkeypatch.setattr(os, "statvfs", collecting)
    with in_time(lambda: segment_of(pool, 50_000)):
        assert pool.reserved_bytes == 50_000

    assert pool.reserved_bytes == 0


def test_a_name_that_cannot_be_removed_gives_its_bytes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path), client_budget_bytes=BUDGET)
    segment = pool.acquire(1000, "a")

    def refuse(_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError):
        pool.release(segment)

    assert pool.reserved_bytes == pool.client_bytes("a") == 0


def test_threads_that_take_and_release_at_once_leave_the_account_at_zero(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path), client_budget_bytes=BUDGET)

    def use(client_id: int) -> None:
        for size in range(1, 101):
            with segment_of(pool, size * 100, f"client_id {client_id}"):
                pass

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))

    assert pool.reserved_bytes == 0
    assert [pool.client_bytes(f"client_id {client_id}") for client_id in range(4)] == [0] * 4
    assert segments_in(tmp_path) == []


def test_a_client_with_a_budget_of_its_own_has_that_one(tmp_path: Path) -> None:
    budgets = {"small": 10_000, "large": 60_000}
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path), 30_000, budgets.get)
    for client, allowed in (("small", 10_000), ("large", 60_000), ("other", 30_000)):
        pool.check(allowed, client)
        with pytest.raises(OverBudget, match=f"at most {allowed} of this client's"):
            pool.check(allowed + 1, client)
    kept = pool.acquire(8_000, "small")
    with pytest.raises(OverBudget, match="2000 of 10000 of this client's left"):
        pool.acquire(4_000, "small")
    budgets["small"] = 20_000  # as when the token file changes
    more = pool.acquire(4_000, "small")
    for segment in (kept, more):
        pool.release(segment)
    assert pool.client_bytes("small") == 0


def test_usage_is_what_the_segments_take_of_what_they_may(tmp_path: Path) -> None:
    pool = SegmentPool(BUDGET, SegmentDirectory(path=tmp_path))
    assert pool.usage() == MemoryUsage(used_bytes=0, limit_bytes=BUDGET)
    with segment_of(pool, 300), segment_of(pool, 500):
        assert pool.usage() == MemoryUsage(used_bytes=800, limit_bytes=BUDGET)
        assert pool.segment_count == 2
    assert (pool.usage().used_bytes, pool.segment_count) == (0, 0)


def test_segments_leave_what_others_will_write_to_the_file_system(tmp_path: Path) -> None:
    answer = on_tmpfs("size=1m", tmp_path, WITH_512_KIB_KEPT_FREE)
    assert answer == {"ever": "768 KiB refused", "large": "384 KiB refused", "small": "128 KiB given"}


WITH_512_KIB_KEPT_FREE = """
import json, sys
from pathlib import Path
from steer_service.core.errors import OverBudget
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory
pool = SegmentPool(64 << 20, SegmentDirectory(path=Path(sys.argv[1])))
pool.kept_free = lambda: 512 << 10
def outcome(kib):
    try:
        pool.release(pool.acquire(kib << 10))
    except OverBudget:
        return f"{kib} KiB refused"
    return f"{kib} KiB given"
ever, held = outcome(768), pool.acquire(256 << 10)
print(json.dumps({"ever": ever, "large": outcome(384), "small": outcome(128)}))
"""
