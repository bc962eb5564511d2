"""What clients hold on the server: for as long as they use it, for nobody else, and freed once."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.errors import InvalidRequest, NotFound
from steer_service.core.events import CaptureHeld
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from steer_service.server.capture_store import CaptureStore, StoredCapture, blocks_of
from tests.server.served import bounded

LONG_S = 3600.0
SHORT_S = 0.02
NBYTES = 3 * 4 * 4
"""Bytes of the rows of each capture here."""


class Memory:
    """Rows that say how often they were freed."""

    def __init__(self, layers: tuple[int, ...] = (1,)) -> None:
        self.freed = 0
        self.was_freed = asyncio.Event()
        arrays = {layer: np.full((3, 4), layer, np.float32) for layer in layers}
        captured = CapturedRows(before=arrays, after=arrays, spans=((2, 4), (7, 8)))
        if len(layers) == 1:
            captured = CapturedRows(after=arrays, spans=captured.spans)
        self.held = LocalCapture(
            metadata_of(captured, layers, prompt_tokens=5, sequence_rows=8), captured, release=self._free
        )

    def _free(self) -> None:
        self.freed += 1
        self.was_freed.set()


class Reader:
    """A task that reads a capture until it is told to end."""

    def __init__(self, store: CaptureStore, key: str, memory: Memory) -> None:
        self._store, self._key, self._memory = store, key, memory
        self.began, self.end = asyncio.Event(), asyncio.Event()
        self.was_there_to_the_end = False
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        with self._store.reading(self._key, "a") as stored:
            self.began.set()
            try:
                await self.end.wait()
                stored.check_there()
            finally:
                self.was_there_to_the_end = not self._memory.freed


class Kept:
    """A store and what it counted."""

    def __init__(self, ttl_s: float = LONG_S, **options: bool) -> None:
        self.counted: Counter[str] = Counter()
        self.store = CaptureStore(ttl_s, lambda why, count: self.counted.update({why: count}), **options)

    def put(self, client_id: str = "a", session: bytes = b"", layers: tuple[int, ...] = (1,)) -> tuple[Memory, str]:
        memory = Memory(layers)
        event = CaptureHeld(output_index=0, held=memory.held)
        return memory, self.store.put(event, client_id, session).key

    def stored(self, key: str, client_id: str = "a") -> StoredCapture:
        with self.store.reading(key, client_id) as stored:
            return stored


async def test_a_stored_capture_is_readable_by_its_owner_until_released() -> None:
    kept = Kept()
    memory, key = kept.put()

    assert kept.stored(key).held is memory.held
    assert (len(kept.store), kept.store.total_bytes) == (1, NBYTES)
    kept.store.release(key, "a")

    assert memory.freed == 1
    assert (len(kept.store), kept.store.total_bytes) == (0, 0)
    assert kept.counted == {"released": NBYTES}
    with pytest.raises(NotFound):
        kept.stored(key)


async def test_keys_cannot_be_guessed() -> None:
    kept = Kept()
    keys = {kept.put()[1] for _ in range(100)}

    assert len(keys) == 100
    assert all(len(key) >= 43 for key in keys)  # 256 bits in base 64
    kept.store.close()


async def test_releasing_again_does_nothing() -> None:
    kept = Kept()
    memory, key = kept.put()

    for _ in range(3):
        kept.store.release(key, "a")

    assert memory.freed == 1
    assert kept.counted == {"released": NBYTES}


async def test_a_foreign_capture_looks_like_one_that_never_existed() -> None:
    kept = Kept()
    memory, key = kept.put("a")

    kept.store.release(key, "b")
    errors = []
    for wrong, client_id in ((key, "b"), (key, ""), ("never", "a"), ("", "a")):
        with pytest.raises(NotFound) as raised:
            kept.stored(wrong, client_id)
        errors.append(raised.value)

    assert len({(error.reason, error.field, error.message) for error in errors}) == 1
    assert memory.freed == 0
    assert kept.stored(key).owner == "a"
    kept.store.close()


async def test_an_unused_entry_expires() -> None:
    kept = Kept(SHORT_S)
    memory, key = kept.put()

    await bounded(memory.was_freed.wait())

    assert memory.freed == 1
    assert kept.counted == {"expired": NBYTES}
    with pytest.raises(NotFound):
        kept.stored(key)
    kept.store.release(key, "a")
    assert memory.freed == 1


async def test_every_use_puts_the_end_off_and_sets_no_timer() -> None:
    kept = Kept()
    _, key = kept.put()
    stored = kept.stored(key)
    timer, ends, uses = stored.timer, [stored.expires_at], [stored.used_at]

    with kept.store.reading(key, "a"):
        for _ in range(1000):
            kept.store.renew(stored)
            ends.append(stored.expires_at)
            uses.append(stored.used_at)

    assert stored.timer is timer
    assert timer is not None
    assert not timer.cancelled()
    assert ends == sorted(ends)
    assert uses == sorted(uses)
    assert (ends[-1] > ends[0], uses[-1] > uses[0]) == (True, True)
    kept.store.close()


async def test_a_used_entry_outlives_an_unused_one() -> None:
    kept = Kept(SHORT_S)
    idle, _ = kept.put()
    used, key = kept.put()
    stored = kept.stored(key)

    while not idle.was_freed.is_set():
        kept.store.renew(stored)
        await asyncio.sleep(0)

    assert (idle.freed, used.freed) == (1, 0)
    await bounded(used.was_freed.wait())
    assert used.freed == 1


async def test_renewing_a_freed_entry_does_not_bring_it_back() -> None:
    kept = Kept()
    memory, key = kept.put()
    stored = kept.stored(key)
    kept.store.release(key, "a")
    timer = stored.timer

    kept.store.renew(stored)

    assert stored.timer is timer
    assert len(kept.store) == 0
    assert memory.freed == 1


async def test_memory_stays_until_its_last_reader_ends() -> None:
    kept = Kept()
    memory, key = kept.put()
    first, second = Reader(kept.store, key, memory), Reader(kept.store, key, memory)
    await bounded(first.began.wait())
    await bounded(second.began.wait())

    kept.store.release(key, "a")
    assert memory.freed == 0
    assert kept.counted == {"released": NBYTES}
    first.end.set()
    with pytest.raises(NotFound):
        await bounded(first.task)
    assert memory.freed == 0
    second.end.set()
    with pytest.raises(NotFound):
        await bounded(second.task)

    assert memory.freed == 1
    assert first.was_there_to_the_end
    assert second.was_there_to_the_end


async def test_a_reader_that_takes_nothing_for_the_whole_time_is_ended_before_the_memory_goes() -> None:
    kept = Kept(SHORT_S)
    memory, key = kept.put()
    reader = Reader(kept.store, key, memory)

    with pytest.raises(asyncio.CancelledError):
        await bounded(reader.task)

    assert reader.was_there_to_the_end
    assert memory.freed == 1
    assert kept.counted == {"expired": NBYTES}


async def test_a_reader_that_begins_at_the_last_moment_has_the_whole_time() -> None:
    kept = Kept(SHORT_S)
    memory, key = kept.put()
    [stored] = kept.store._captures.values()
    while asyncio.get_running_loop().time() < stored.used_at + SHORT_S:
        pass  # its end is due, and the loop has not come to it

    reader = Reader(kept.store, key, memory)
    await bounded(reader.began.wait())

    assert memory.freed == 0
    reader.end.set()
    await bounded(reader.task)
    assert memory.freed == 0
    kept.store.close()


async def test_with_a_send_timeout_memory_stays_while_read_and_expires_afterwards() -> None:
    kept = Kept(SHORT_S, keeps_read=True)
    memory, key = kept.put()
    reader = Reader(kept.store, key, memory)
    await bounded(reader.began.wait())

    for _ in range(3):
        idle, _ = kept.put()
        await bounded(idle.was_freed.wait())
    assert memory.freed == 0
    reader.end.set()
    await bounded(reader.task)

    assert memory.freed == 0
    await bounded(memory.was_freed.wait())
    assert kept.counted == {"expired": 4 * NBYTES}


async def test_a_reader_that_ends_leaves_the_capture_to_the_next() -> None:
    kept = Kept()
    memory, key = kept.put()
    for _ in range(2):
        reader = Reader(kept.store, key, memory)
        await bounded(reader.began.wait())
        reader.end.set()
        await bounded(reader.task)

    assert memory.freed == 0
    kept.store.close()
    assert memory.freed == 1


async def test_a_reader_that_fails_leaves_the_capture_there() -> None:
    kept = Kept()
    memory, key = kept.put()

    with pytest.raises(KeyError), kept.store.reading(key, "a"):
        raise KeyError

    assert memory.freed == 0
    assert not kept.stored(key).readers
    kept.store.close()


async def test_a_lease_is_never_read_by_the_server_for_its_client_can_shorten_the_segment() -> None:
    kept = Kept()
    memory, key = kept.put(session=b"s")

    with pytest.raises(NotFound) as raised:
        kept.stored(key)

    assert raised.value.reason == "UNKNOWN_CAPTURE"
    assert memory.freed == 0
    kept.store.release(key, "a")
    assert memory.freed == 1


async def test_with_a_session_end_its_leases_and_no_others() -> None:
    kept = Kept()
    leased = [kept.put(session=b"s")[0] for _ in range(3)]
    others = [kept.put(session=b"t")[0], kept.put()[0], kept.put("b")[0]]

    kept.store.end_session(b"s")
    kept.store.end_session(b"s")

    assert [memory.freed for memory in leased] == [1, 1, 1]
    assert [memory.freed for memory in others] == [0, 0, 0]
    assert kept.counted == {"released": 3 * NBYTES}
    kept.store.close()


async def test_closing_frees_everything_once_and_cancels_the_timers() -> None:
    kept = Kept(SHORT_S)
    memories = [kept.put()[0], kept.put(session=b"s")[0]]
    _, key = kept.put()
    stored = kept.stored(key)

    kept.store.close()
    kept.store.close()
    kept.store.end_session(b"s")

    assert [memory.freed for memory in memories] == [1, 1]
    assert stored.timer is not None
    assert stored.timer.cancelled()
    assert (len(kept.store), kept.store.total_bytes) == (0, 0)


async def test_blocks_come_by_layer_in_the_order_asked_for_before_first_and_once() -> None:
    kept = Kept()
    stored = kept.stored(kept.put(layers=(3, 1))[1])

    def order(*args: object) -> list[tuple[int, CaptureSite]]:
        return [(block.layer, block.site) for block in blocks_of(stored, *args)]  # type: ignore[arg-type]

    before, after = CaptureSite.BEFORE, CaptureSite.AFTER
    assert order() == [(3, before), (3, after), (1, before), (1, after)]
    assert order([1, 3, 1]) == [(1, before), (1, after), (3, before), (3, after)]
    assert [block.spans for block in blocks_of(stored, [1], ((3, 4), (7, 8)))] == [((3, 4), (7, 8))] * 2
    with pytest.raises(InvalidRequest):
        order([2])
    with pytest.raises(InvalidRequest):
        order([1], ((4, 5),))
    kept.store.close()
