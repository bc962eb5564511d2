"""Places for requests in flight: fewer after a refusal, and no start before its pause is over."""

import asyncio

from steer_service.runtime.places import Places

LONG_S = 100.0


async def waiting(places: Places, count: int) -> "list[asyncio.Task[None]]":
    tasks = [asyncio.create_task(places.take()) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def done(tasks: "list[asyncio.Task[None]]") -> int:
    return sum(task.done() for task in tasks)


async def ended(tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_no_more_than_the_most_are_taken() -> None:
    places = Places(3)
    tasks = await waiting(places, 5)
    assert done(tasks) == 3
    places.give_back()
    await asyncio.sleep(0)
    assert done(tasks) == 4
    await ended(tasks)


async def test_without_a_limit_all_are_taken() -> None:
    assert done(await waiting(Places(None), 500)) == 500


async def test_after_a_refusal_nothing_starts_before_the_pause() -> None:
    places = Places(None)
    await places.take()
    places.note_refusal(0.01)
    tasks = await waiting(places, 2)
    assert done(tasks) == 0
    await asyncio.wait_for(tasks[0], 10)  # the pause is over; one is sent to see whether there is room
    await asyncio.sleep(0)
    assert done(tasks) == 1
    await ended(tasks)
    places.close()


async def test_after_a_refusal_as_many_run_as_the_server_took() -> None:
    places = Places(None)
    await waiting(places, 8)
    for _ in range(4):  # refused together: one pause
        places.note_refusal(LONG_S)
    assert places.refusals == 1
    tasks = await waiting(places, 4)
    assert done(tasks) == 0
    places.note_success()  # its place on the server is free: no need to wait for the pause
    await asyncio.sleep(0)
    assert done(tasks) == 1
    await ended(tasks)
    places.close()


async def test_successes_bring_the_places_back_one_for_four() -> None:
    places = Places(None)
    await waiting(places, 3)
    places.note_refusal(LONG_S)
    tasks = await waiting(places, 20)
    for successes in range(1, 9):
        places.note_success()
        await asyncio.sleep(0)
        assert done(tasks) == successes + successes // 4
    await ended(tasks)
    places.close()


async def test_a_waiter_that_is_cancelled_as_it_gets_a_place_leaves_it() -> None:
    places = Places(1)
    await places.take()
    [first, second] = await waiting(places, 2)
    places.give_back()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.wait_for(second, 10)
