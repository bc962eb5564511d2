"""The messages of the slot allocator to the workers: what travels together, in which order, and after a failure."""

import asyncio

import pytest

from steer_service.core.errors import EngineFailed
from steer_service.engine.slots import BankSize, SlotAllocator
from tests.engine.bank_contents import SIZE, assert_holds, program
from tests.engine.fake_workers import LIMIT_S, Workers, hold, turns, use


async def test_programs_asked_for_at_once_travel_in_one_message() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)

    await asyncio.gather(*(use(slots, program(number)) for number in range(3)))

    assert [[load.digest for load in message] for message in workers.messages] == [
        [program(number).digest for number in range(3)]
    ]


async def test_requests_that_come_while_a_message_is_in_flight_wait_for_the_next() -> None:
    workers = Workers()
    workers.open.clear()
    slots = SlotAllocator(SIZE, workers.load)
    first = asyncio.create_task(use(slots, program(0)))
    await asyncio.wait_for(workers.arrived.wait(), LIMIT_S)

    others = [asyncio.create_task(use(slots, program(number))) for number in (1, 2)]
    await turns()
    assert len(workers.messages) == 1
    workers.open.set()
    await asyncio.wait_for(asyncio.gather(first, *others), LIMIT_S)

    assert [len(message) for message in workers.messages] == [1, 2]


async def test_no_lease_is_given_before_the_workers_have_answered() -> None:
    workers = Workers()
    workers.open.clear()
    slots = SlotAllocator(SIZE, workers.load)

    asking = [asyncio.create_task(use(slots, program(0))) for _ in range(2)]
    await asyncio.wait_for(workers.arrived.wait(), LIMIT_S)
    await turns()
    assert not any(task.done() for task in asking)

    workers.open.set()
    await asyncio.wait_for(asyncio.gather(*asking), LIMIT_S)


async def test_a_slot_is_emptied_before_it_is_filled_again() -> None:
    workers = Workers()
    slots = SlotAllocator(BankSize(slots=1, rows=6, operations_per_layer=6), workers.load)

    for number in (0, 1, 0):
        await use(slots, program(number))

    sent = [(load.slot, load.digest) for message in workers.messages for load in message]
    assert sent == [
        (0, program(0).digest), (0, ""), (0, program(1).digest), (0, ""), (0, program(0).digest)
    ]  # fmt: skip


async def test_a_program_whose_requester_left_while_it_was_loading_can_be_replaced_and_asked_for_again() -> None:
    workers = Workers(BankSize(slots=1, rows=6, operations_per_layer=6))
    workers.open.clear()
    slots = SlotAllocator(BankSize(slots=1, rows=6, operations_per_layer=6), workers.load)
    left = asyncio.create_task(use(slots, program(0)))
    await asyncio.wait_for(workers.arrived.wait(), LIMIT_S)
    left.cancel()
    await turns()

    other = asyncio.create_task(use(slots, program(1)))
    again = asyncio.create_task(use(slots, program(0)))
    await turns()
    workers.open.set()
    await asyncio.wait_for(asyncio.gather(other, again), LIMIT_S)

    assert workers.bank.holds(0, program(0).digest)


async def test_a_failed_load_reaches_all_its_waiters_and_the_next_attempt_works() -> None:
    workers = Workers()
    workers.failures = [1]
    slots = SlotAllocator(SIZE, workers.load)

    outcomes = await asyncio.gather(
        *(use(slots, program(number, operations=3)) for number in (0, 0, 1)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 3
    assert slots.resident == 0

    async with hold(slots, program(0, operations=6)) as (lease,):  # slot and rows were given back
        assert_holds(workers.bank, lease.slot, program(0, operations=6))


async def test_room_given_back_by_a_failed_load_goes_to_those_who_wait() -> None:
    workers = Workers()
    workers.failures = [0]
    workers.open.clear()
    slots = SlotAllocator(BankSize(slots=1, rows=1, operations_per_layer=1), workers.load)
    failing = asyncio.create_task(use(slots, program(0)))
    waiting = asyncio.create_task(use(slots, program(1)))
    await turns()

    workers.open.set()

    with pytest.raises(EngineFailed):
        await asyncio.wait_for(failing, LIMIT_S)
    await asyncio.wait_for(waiting, LIMIT_S)


@pytest.mark.parametrize("applied", range(5))
async def test_evictions_of_a_failed_message_are_repeated_by_the_next(applied: int) -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)
    for number in range(3):
        await use(slots, program(number, operations=2))

    workers.failures = [applied]
    with pytest.raises(EngineFailed):
        await use(slots, program(3, operations=6))  # three evictions and a load

    async with hold(slots, program(4, operations=6)) as (lease,):
        assert_holds(workers.bank, lease.slot, program(4, operations=6))


async def test_workers_that_never_answer_again_fail_each_request_once() -> None:
    workers = Workers()
    workers.failures = [0, 0, 0]
    slots = SlotAllocator(SIZE, workers.load)

    for number in range(3):
        with pytest.raises(EngineFailed):
            await use(slots, program(number))
    await turns()

    assert len(workers.messages) == 3
