"""The slot allocator: one program per slot while it is used, and what was asked first is served first."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.engine.slots import BankSize, SlotAllocator
from tests.engine.bank_contents import SIZE, assert_holds, program
from tests.engine.fake_workers import LIMIT_S, Workers, hold, turns, use


async def test_programs_in_use_have_different_slots() -> None:
    slots = SlotAllocator(SIZE, Workers().load)

    async with hold(slots, program(0), program(1), program(2)) as leases:
        assert {lease.slot for lease in leases} == {0, 1, 2}


async def test_equal_programs_share_one_slot_and_are_loaded_once() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)

    async with hold(slots, program(0), program(0), program(0)) as leases:
        assert len({lease.slot for lease in leases}) == 1
    async with hold(slots, program(0)):
        pass

    assert workers.placed() == [program(0).digest]


async def test_a_program_leaves_its_slot_only_when_its_last_user_has_left() -> None:
    workers = Workers()
    slots = SlotAllocator(BankSize(slots=1, rows=6, operations_per_layer=6), workers.load)
    first, second = AsyncExitStack(), AsyncExitStack()
    await first.enter_async_context(slots.lease(program(0)))
    lease = await second.enter_async_context(slots.lease(program(0)))
    waiter = asyncio.create_task(use(slots, program(1)))

    await first.aclose()
    await turns()
    assert not waiter.done()
    assert_holds(workers.bank, lease.slot, program(0))

    await second.aclose()
    await asyncio.wait_for(waiter, LIMIT_S)


async def test_an_idle_program_stays_until_its_place_is_needed() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)

    for number in (0, 1, 2, 0, 1, 2):
        await use(slots, program(number))

    assert slots.resident == 3
    assert len(workers.placed()) == 3


async def test_a_program_is_found_while_it_is_in_the_bank_in_use_or_not() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    first, others = program(0), [program(number) for number in range(1, 1 + SIZE.slots)]
    assert slots.find(first.digest) is None

    async with slots.lease(first):
        assert slots.find(first.digest) is first
    assert slots.find(first.digest) is first
    for other in others:
        async with slots.lease(other):
            pass

    assert slots.find(first.digest) is None


async def test_the_least_recently_used_idle_program_goes_first() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)
    for number in (0, 1, 2, 0):
        await use(slots, program(number))

    await use(slots, program(3))  # in place of 1
    for number in (0, 2, 3):
        await use(slots, program(number))

    assert workers.placed() == [program(number).digest for number in (0, 1, 2, 3)]


async def test_a_program_that_was_just_released_was_just_used() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)
    async with hold(slots, program(0)):
        await use(slots, program(1))
        await use(slots, program(2))

    await use(slots, program(3))
    await use(slots, program(0))

    assert workers.placed() == [program(number).digest for number in (0, 1, 2, 3)]


async def test_a_program_in_use_is_never_evicted_however_long_ago_it_came() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)

    async with hold(slots, program(0)) as (lease,):
        for number in range(1, 8):
            await use(slots, program(number))
            assert_holds(workers.bank, lease.slot, program(0))


async def test_as_many_idle_programs_go_as_the_rows_of_a_new_one_need() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)
    for number in range(3):
        await use(slots, program(number, operations=2))

    await use(slots, program(3, operations=4))

    assert slots.resident == 2  # the newest of the idle ones stayed
    await use(slots, program(2, operations=2))
    assert len(workers.placed()) == 4


@pytest.mark.parametrize("operations", [7, 100])
async def test_a_program_that_can_never_fit_is_refused_with_the_numbers(operations: int) -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)

    with pytest.raises(InvalidRequest, match=f"the program holds {operations} operations, the bank 6") as raised:
        await use(slots, program(0, operations=operations))

    assert (raised.value.reason, raised.value.field) == ("PROGRAM_TOO_LARGE", "steering")
    assert workers.messages == []


async def test_usage_tells_programs_in_use_from_idle_ones_and_counts_the_requests_that_wait() -> None:
    slots = SlotAllocator(BankSize(slots=2, rows=6, operations_per_layer=6), Workers().load)
    await use(slots, program(0))
    async with hold(slots, program(1), program(1)):
        usage = slots.usage()
        assert (usage.slots, usage.slots_used, usage.slots_idle, usage.waiting_requests) == (2, 1, 1, 0)
        of_one = program(0).operation_count
        assert (usage.operations, usage.operations_used, usage.operations_idle) == (6, of_one, of_one)
        async with hold(slots, program(2)):
            waiters = [asyncio.create_task(use(slots, program(number))) for number in (3, 3, 4)]
            await turns()
            usage = slots.usage()
            assert (usage.slots_used, usage.slots_idle, usage.waiting_requests) == (2, 0, 3)
        await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)
    assert slots.usage().waiting_requests == 0
