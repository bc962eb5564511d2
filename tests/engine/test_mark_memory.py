"""The memory of marks: blocks do not overlap, and none is used again while a worker may still write to it."""

import asyncio
import random
import weakref

import pytest

from steer_service.core.errors import EngineFailed
from steer_service.core.usage import MemoryUsage
from steer_service.engine.mark_memory import CLIENT_SHARE, MAX_BYTES, MIN_BYTES, MarkMemory, mark_memory_bytes
from steer_service.engine.region import ALIGNMENT
from steer_service.shm.segments import private_segment

LIMIT_S = 20


class Workers:
    """Answers fences once it is told to."""

    def __init__(self) -> None:
        self.fences = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.was_asked = asyncio.Event()
        self.is_dead = False

    async def fence(self) -> None:
        self.fences += 1
        self.was_asked.set()
        await self.may_answer.wait()
        if self.is_dead:
            raise EngineFailed("the engine died")


def memory(blocks: int) -> tuple[MarkMemory, Workers]:
    workers = Workers()
    return MarkMemory(private_segment(blocks * ALIGNMENT), workers.fence), workers


async def filled(marks: MarkMemory, blocks: int) -> list[int]:
    offsets = [await marks.acquire(ALIGNMENT) for _ in range(blocks)]
    return [offset for offset in offsets if offset is not None]


async def test_blocks_do_not_overlap_and_a_full_memory_has_none() -> None:
    marks, workers = memory(4)

    offsets = [await marks.acquire(size) for size in (1, ALIGNMENT, ALIGNMENT + 1)]

    assert offsets == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert await marks.acquire(1) is None
    assert workers.fences == 0
    assert marks.used_bytes == 4 * ALIGNMENT


async def test_a_freed_block_is_used_again_only_after_a_fence_and_is_zeroed() -> None:
    marks, workers = memory(2)
    first, _ = await filled(marks, 2)
    workers.may_answer.clear()
    marks.release(first)

    waiting = asyncio.create_task(marks.acquire(ALIGNMENT))
    await asyncio.wait_for(workers.was_asked.wait(), LIMIT_S)
    assert not waiting.done()
    marks.segment.memory[first] = 255  # a worker that is a step behind
    workers.may_answer.set()

    assert await asyncio.wait_for(waiting, LIMIT_S) == first
    assert marks.segment.memory[first : first + ALIGNMENT] == bytes(ALIGNMENT)


async def test_one_fence_serves_all_that_wait_and_all_that_was_freed_before_it() -> None:
    marks, workers = memory(8)
    for offset in await filled(marks, 8):
        marks.release(offset)

    offsets = await asyncio.wait_for(asyncio.gather(*(marks.acquire(ALIGNMENT) for _ in range(8))), LIMIT_S)

    assert sorted(offset for offset in offsets if offset is not None) == [ALIGNMENT * index for index in range(8)]
    assert workers.fences == 1


async def test_a_block_freed_during_a_fence_waits_for_the_next() -> None:
    marks, workers = memory(2)
    first, second = await filled(marks, 2)
    workers.may_answer.clear()
    marks.release(first)
    both = asyncio.create_task(marks.acquire(2 * ALIGNMENT))
    await asyncio.wait_for(workers.was_asked.wait(), LIMIT_S)
    marks.release(second)
    workers.may_answer.set()

    assert await asyncio.wait_for(both, LIMIT_S) == 0
    assert workers.fences == 2


async def test_neighbours_that_were_freed_are_one_block_again() -> None:
    marks, _ = memory(64)
    offsets = await filled(marks, 64)
    random.Random(3).shuffle(offsets)
    for offset in offsets:
        marks.release(offset)

    assert await marks.acquire(64 * ALIGNMENT) == 0


async def test_a_client_has_a_share_and_others_go_on() -> None:
    marks, workers = memory(CLIENT_SHARE * 2)

    assert [await marks.acquire(ALIGNMENT, "a") for _ in range(3)] == [0, ALIGNMENT, None]
    assert await marks.acquire(ALIGNMENT, "b") == 2 * ALIGNMENT
    marks.release(0)
    assert await marks.acquire(ALIGNMENT, "a") is not None
    assert workers.fences == 0


async def test_a_fence_that_fails_loses_no_block() -> None:
    marks, workers = memory(1)
    marks.release(*await filled(marks, 1))
    workers.is_dead = True
    with pytest.raises(EngineFailed):
        await marks.acquire(ALIGNMENT)

    workers.is_dead = False
    assert await marks.acquire(ALIGNMENT) == 0


async def test_a_caller_that_leaves_during_a_fence_takes_no_block() -> None:
    marks, workers = memory(1)
    marks.release(*await filled(marks, 1))
    workers.may_answer.clear()
    leaving = asyncio.create_task(marks.acquire(ALIGNMENT))
    await asyncio.wait_for(workers.was_asked.wait(), LIMIT_S)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    workers.may_answer.set()

    assert await asyncio.wait_for(marks.acquire(ALIGNMENT), LIMIT_S) == 0


async def test_a_closed_memory_is_unmapped_once_no_output_has_a_block() -> None:
    marks, _ = memory(2)
    await filled(marks, 1)
    block = memoryview(marks.segment.memory)[:ALIGNMENT]
    mapping = weakref.ref(marks.segment.memory)

    marks.close()

    block[0] = 1  # its output still ends
    assert mapping() is not None
    marks.release(0)
    del block
    assert mapping() is None


async def test_a_closed_memory_has_no_blocks() -> None:
    marks, _ = memory(2)
    marks.close()
    assert await marks.acquire(1) is None


@pytest.mark.parametrize(
    ("marks", "requests", "file_system", "size"),
    [
        (512, 32, None, MIN_BYTES),
        (100_000, 256, None, 100_032 * 256),
        (1 << 20, 1024, None, MAX_BYTES),
        (1 << 17, 1024, 64 << 20, 8 << 20),
        (1 << 20, 4, 1 << 20, 1 << 20),
    ],
)
def test_the_size_follows_from_the_longest_outputs_and_the_file_system(
    marks: int, requests: int, file_system: int | None, size: int
) -> None:
    assert mark_memory_bytes(marks, requests, file_system) == size


async def test_usage_is_the_blocks_in_use() -> None:
    marks, _ = memory(4)
    offset = await marks.acquire(1)
    assert offset is not None
    assert marks.usage() == MemoryUsage(used_bytes=ALIGNMENT, limit_bytes=4 * ALIGNMENT)
    marks.release(offset)
    assert marks.usage().used_bytes == 0
