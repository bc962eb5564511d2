"""Streams as one or under way early: everything arrives, errors are told, every source is closed on every way out."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import EngineFailed
from steer_service.runtime.merge import after_first, merge, started_early

LIMIT_S = 10


class Source:
    """Yields so many items, each after some turns of the loop, and then ends, fails or hangs."""

    def __init__(self, name: str, turns: list[int], *, failure: Exception | None = None, hangs: bool = False) -> None:
        self.name = name
        self.turns = turns
        self.failure = failure
        self.hangs = hangs
        self.closing_failure: Exception | None = None
        self.asked = 0
        """Items that were asked for."""
        self.hanging = asyncio.Event()
        self.is_closed = False

    async def items(self) -> AsyncGenerator[tuple[str, int], None]:
        try:
            for index, turns in enumerate(self.turns):
                self.asked += 1
                for _ in range(turns):
                    await asyncio.sleep(0)
                yield self.name, index
            if self.failure is not None:
                raise self.failure
            if self.hangs:
                self.hanging.set()
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # closing takes a turn, as it does over a network
            self.is_closed = True
            if self.closing_failure is not None:
                raise self.closing_failure


def merged(*sources: Source) -> AsyncGenerator[tuple[str, int], None]:
    return merge([source.items() for source in sources])


async def collected(*sources: Source) -> list[tuple[str, int]]:
    async with asyncio.timeout(LIMIT_S), aclosing(merged(*sources)) as items:
        return [item async for item in items]


TURNS = st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=5)


@given(TURNS)
def test_every_item_arrives_once_and_each_source_in_its_order(turns: list[list[int]]) -> None:
    async def run() -> None:
        sources = [Source(str(index), one) for index, one in enumerate(turns)]

        items = await collected(*sources)

        for source in sources:
            assert [item for item in items if item[0] == source.name] == [
                (source.name, i) for i in range(len(source.turns))
            ]
        assert len(items) == sum(map(len, turns))
        assert all(source.is_closed for source in sources)

    asyncio.run(run())


@given(TURNS.filter(any), st.data())
def test_a_reader_that_leaves_closes_every_source(turns: list[list[int]], data: st.DataObject) -> None:
    taken = data.draw(st.integers(1, sum(map(len, turns))))

    async def run() -> None:
        sources = [Source(str(index), one) for index, one in enumerate(turns)]
        async with asyncio.timeout(LIMIT_S), aclosing(merged(*sources)) as items:
            for _ in range(taken):
                await anext(items)

        assert all(source.is_closed for source in sources if source.asked)

    asyncio.run(run())


async def test_items_come_as_they_are_ready_and_not_one_source_after_the_other() -> None:
    slow, quick = Source("slow", [20]), Source("quick", [0, 0, 0])

    assert await collected(slow, quick) == [("quick", 0), ("quick", 1), ("quick", 2), ("slow", 0)]


async def test_a_source_is_asked_for_its_next_item_when_its_last_was_consumed() -> None:
    source = Source("a", [0, 0, 0])

    async with aclosing(merged(source)) as items:
        await anext(items)
        for _ in range(10):
            await asyncio.sleep(0)
        assert source.asked == 1

        await anext(items)
        assert source.asked == 2


async def test_the_error_of_a_source_is_raised_and_closes_the_others() -> None:
    failing = Source("failing", [0], failure=EngineFailed("gone"))
    hanging = Source("hanging", [0], hangs=True)

    with pytest.raises(EngineFailed, match="gone"):
        await collected(failing, hanging)

    assert failing.is_closed
    assert hanging.is_closed


async def test_items_that_came_before_an_error_are_delivered() -> None:
    async with asyncio.timeout(LIMIT_S):
        items = merged(Source("a", [0, 0], failure=EngineFailed("gone")))

        assert [await anext(items), await anext(items)] == [("a", 0), ("a", 1)]
        with pytest.raises(EngineFailed, match="gone"):
            await anext(items)


async def test_a_cancelled_reader_closes_every_source() -> None:
    sources = [Source("a", [], hangs=True), Source("b", [0], hangs=True)]
    reader = asyncio.create_task(collected(*sources))
    for source in sources:
        await asyncio.wait_for(source.hanging.wait(), LIMIT_S)

    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reader, LIMIT_S)

    assert all(source.is_closed for source in sources)


async def test_a_source_that_fails_to_close_does_not_keep_the_others_open() -> None:
    sources = [Source(name, [0, 0]) for name in "abc"]
    sources[0].closing_failure = EngineFailed("would not close")
    items = merged(*sources)
    for _ in sources:
        await anext(items)

    with pytest.raises(EngineFailed, match="would not close"):
        await asyncio.wait_for(items.aclose(), LIMIT_S)

    assert all(source.is_closed for source in sources)


async def test_no_sources_make_an_empty_stream() -> None:
    assert await collected() == []


async def test_a_stream_that_nobody_began_to_read_starts_no_source() -> None:
    source = Source("a", [0])

    await merged(source).aclose()

    assert source.asked == 0


@given(st.lists(st.integers(0, 4), max_size=5))
def test_a_source_that_is_begun_gives_all_its_items(turns: list[int]) -> None:
    async def run() -> None:
        source = Source("a", turns)
        async with asyncio.timeout(LIMIT_S), started_early(source.items()) as items:
            assert [index async for _, index in items] == list(range(len(turns)))
        assert source.is_closed

    asyncio.run(run())


async def test_it_works_on_its_first_item_and_no_other_before_it_is_read() -> None:
    source = Source("a", [0, 0])

    async with started_early(source.items()):
        for _ in range(10):
            await asyncio.sleep(0)
        assert source.asked == 1

    assert source.is_closed


@pytest.mark.parametrize("taken", [1, 2])
async def test_a_reader_that_leaves_closes_what_was_begun(taken: int) -> None:
    source = Source("a", [0, 3, 0])

    async with asyncio.timeout(LIMIT_S), started_early(source.items()) as items:
        for _ in range(taken):
            await anext(items)

    assert source.asked == taken
    assert source.is_closed


async def test_a_source_that_hangs_is_ended_while_its_first_item_is_read_and_while_it_is_not() -> None:
    for is_read in (False, True):
        source = Source("a", [], hangs=True)
        stream = started_early(source.items())
        items = await stream.__aenter__()
        if is_read:
            reading = asyncio.ensure_future(anext(items))
        await asyncio.wait_for(source.hanging.wait(), LIMIT_S)
        if is_read:
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(reading, LIMIT_S)
        await asyncio.wait_for(stream.__aexit__(None, None, None), LIMIT_S)

        assert source.is_closed


async def test_the_first_error_waits_for_whoever_reads() -> None:
    async with started_early(Source("a", [], failure=EngineFailed("gone")).items()) as items:
        await asyncio.sleep(0)
        with pytest.raises(EngineFailed, match="gone"):
            await anext(items)


async def test_an_error_that_nobody_reads_is_not_raised() -> None:
    source = Source("a", [], failure=EngineFailed("gone"))

    async with started_early(source.items()):
        for _ in range(3):
            await asyncio.sleep(0)

    assert source.is_closed


@pytest.mark.parametrize("first", [[3, 0], [3], []], ids=["two items", "one", "none"])
async def test_the_first_item_of_the_first_source_comes_before_all_others(first: list[int]) -> None:
    sources = [Source("0", first), Source("1", [0, 0]), Source("2", [])]

    async with asyncio.timeout(LIMIT_S), aclosing(merge(after_first([one.items() for one in sources]))) as items:
        got = [item async for item in items]

    assert sorted(got) == [("0", index) for index in range(len(first))] + [("1", 0), ("1", 1)]
    assert got[0][0] == ("0" if first else "1")
    assert all(one.is_closed for one in sources)


async def test_the_others_start_early_and_are_closed_if_the_first_fails() -> None:
    failing, waiting = Source("0", [], failure=EngineFailed("broken")), Source("1", [0], hangs=True)

    async with asyncio.timeout(LIMIT_S), aclosing(merge(after_first([failing.items(), waiting.items()]))) as items:
        with pytest.raises(EngineFailed, match="broken"):
            await anext(items)

    assert waiting.asked == 1
    assert waiting.is_closed
