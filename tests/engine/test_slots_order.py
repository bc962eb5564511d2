"""The order in which a full bank serves requests: nobody waits for ever, and nobody waits without need."""

import asyncio
from contextlib import AsyncExitStack

from steer_service.engine.slots import BankSize, SlotAllocator
from tests.engine.bank_contents import SIZE, program
from tests.engine.fake_workers import LIMIT_S, Workers, hold, turns, use

ONE_SLOT = BankSize(slots=1, rows=1, operations_per_layer=1)


async def test_a_full_bank_serves_waiters_in_order_of_arrival() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    served: list[int] = []

    async def visit(number: int) -> None:
        async with slots.lease(program(number)):
            served.append(number)

    async with hold(slots, program(0), program(1), program(2)):
        waiters = [asyncio.create_task(visit(number)) for number in (7, 4, 9, 5)]
        await turns()
        assert served == []
        assert slots.waiting == 4
    await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)

    assert served == [7, 4, 9, 5]
    assert slots.waiting == 0


async def test_requests_for_programs_in_the_bank_are_served_while_another_program_waits() -> None:
    slots = SlotAllocator(SIZE, Workers().load)

    async with hold(slots, program(0), program(1), program(1), program(2), program(2)):
        waiter = asyncio.create_task(use(slots, program(3)))  # will replace 0, which has the fewest users
        await turns()
        for number in (1, 2, 1, 2):
            await asyncio.wait_for(use(slots, program(number)), LIMIT_S)
        assert not waiter.done()
    await asyncio.wait_for(waiter, LIMIT_S)


async def test_a_stream_of_requests_for_every_program_in_the_bank_does_not_starve_a_waiter() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    requests: set[asyncio.Task[None]] = set()

    async def request(number: int) -> None:
        async with slots.lease(program(number)):
            await turns(6)

    async def stream() -> None:
        """A request for each program every second turn, so that none of them is ever idle."""
        while True:
            requests.update(asyncio.create_task(request(number)) for number in range(3))
            await turns(2)

    streaming = asyncio.create_task(stream())
    await turns()
    assert slots.resident == 3
    await asyncio.wait_for(use(slots, program(3)), LIMIT_S)

    streaming.cancel()
    await asyncio.wait_for(asyncio.gather(*requests), LIMIT_S)  # and those that waited behind it are served


async def test_a_waiter_claims_the_program_with_the_fewest_users_and_of_equals_the_one_used_longest_ago() -> None:
    slots = SlotAllocator(SIZE, Workers().load)

    async with hold(slots, program(0), program(0), program(1), program(2)):
        waiter = asyncio.create_task(use(slots, program(3)))
        await turns()
        others = [asyncio.create_task(use(slots, program(number))) for number in (0, 1, 2)]
        await turns()

        assert [other.done() for other in others] == [True, False, True]
    await asyncio.wait_for(asyncio.gather(waiter, *others), LIMIT_S)


async def test_new_users_of_a_claimed_program_wait_behind_its_claimant() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    was_served = asyncio.Event()

    async def large() -> None:
        async with slots.lease(program(1, operations=4)):
            was_served.set()

    async def newcomer() -> None:
        async with slots.lease(program(0, operations=3)):
            assert was_served.is_set()

    async with hold(slots, program(0, operations=3)):
        waiters = [asyncio.create_task(large()), asyncio.create_task(newcomer())]
        await turns()

    await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)


async def test_an_idle_program_that_no_waiter_needs_is_still_served() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)
    await use(slots, program(1))

    async with hold(slots, program(0, operations=4)):
        waiter = asyncio.create_task(use(slots, program(2, operations=3)))  # 1 would not be enough, 0 is
        await turns()
        await asyncio.wait_for(use(slots, program(1)), LIMIT_S)
        assert not waiter.done()
    await asyncio.wait_for(waiter, LIMIT_S)

    assert workers.placed().count(program(1).digest) == 1


async def test_another_program_that_becomes_idle_first_is_replaced_and_the_claim_is_dropped() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    other = AsyncExitStack()

    async with hold(slots, program(0), program(2), program(2)):
        await other.enter_async_context(slots.lease(program(1)))
        await other.enter_async_context(slots.lease(program(1)))
        waiter = asyncio.create_task(use(slots, program(3)))  # claims 0
        behind = asyncio.create_task(use(slots, program(0)))
        await turns()
        assert not behind.done()

        await other.aclose()
        await asyncio.wait_for(asyncio.gather(waiter, behind), LIMIT_S)


async def test_a_small_program_overtakes_a_large_one_if_that_costs_it_nothing() -> None:
    slots = SlotAllocator(SIZE, Workers().load)

    async with hold(slots, program(0, operations=3)):
        large = asyncio.create_task(use(slots, program(1, operations=4)))  # 0 and one free row will be enough
        await turns()
        async with hold(slots, program(2, operations=2)):
            too_large = asyncio.create_task(use(slots, program(3)))  # this row is set aside
            await turns()
            assert not large.done()
            assert not too_large.done()
    await asyncio.wait_for(asyncio.gather(large, too_large), LIMIT_S)


async def test_small_programs_do_not_starve_a_large_one_that_needs_the_whole_bank() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    served: list[int] = []

    async def visit(number: int, operations: int) -> None:
        async with slots.lease(program(number, operations=operations)):
            served.append(number)
            await turns(3)

    async with hold(slots, program(0), program(1)):
        large = asyncio.create_task(visit(99, 6))
        await turns()
        small = [asyncio.create_task(visit(number, 1)) for number in range(2, 12)]
        await turns()
        assert served == []
    await asyncio.wait_for(asyncio.gather(large, *small), LIMIT_S)

    assert served == [99, *range(2, 12)]


async def test_a_large_program_gathers_room_from_the_programs_that_were_served_before_it() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    served: list[int] = []

    async def visit(number: int, operations: int) -> None:
        async with slots.lease(program(number, operations=operations)):
            served.append(number)
            await turns(3)

    async with hold(slots, program(0, operations=2), program(1, operations=2), program(2, operations=2)):
        waiting = [(3, 2), (4, 6), (5, 2), (6, 6), (7, 1)]
        visits = [asyncio.create_task(visit(*one)) for one in waiting]
        await turns()
        assert served == []
    await asyncio.wait_for(asyncio.gather(*visits), LIMIT_S)

    assert served.index(3) < served.index(4) < served.index(6)
    assert sorted(served) == [3, 4, 5, 6, 7]


async def test_a_waiter_that_gives_up_does_not_hold_up_the_others() -> None:
    slots = SlotAllocator(SIZE, Workers().load)

    async with hold(slots, program(0, operations=3)):
        large = asyncio.create_task(use(slots, program(1, operations=6)))
        behind = asyncio.create_task(use(slots, program(2)))
        small = asyncio.create_task(use(slots, program(3)))
        await turns()
        assert not small.done()
        behind.cancel()
        large.cancel()

        await asyncio.wait_for(small, LIMIT_S)  # there was room for it all the time
        await asyncio.wait_for(use(slots, program(0, operations=3)), LIMIT_S)  # and the claim is dropped

    assert large.cancelled()
    assert behind.cancelled()


async def test_a_waiter_that_gives_up_as_room_comes_leaves_the_room_to_the_next() -> None:
    slots = SlotAllocator(ONE_SLOT, Workers().load)
    held = AsyncExitStack()
    await held.enter_async_context(slots.lease(program(0)))
    first, second = (asyncio.create_task(use(slots, program(number))) for number in (1, 2))
    await turns()

    await held.aclose()
    first.cancel()

    await asyncio.wait_for(second, LIMIT_S)
    assert first.cancelled()


async def test_requests_for_one_program_that_wait_get_it_together() -> None:
    workers = Workers()
    slots = SlotAllocator(ONE_SLOT, workers.load)

    async with hold(slots, program(0)):
        waiters = [asyncio.create_task(use(slots, program(1))) for _ in range(3)]
        await turns()
    await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)

    assert workers.placed() == [program(0).digest, program(1).digest]


async def test_a_lease_can_be_shared_while_its_program_is_claimed() -> None:
    slots = SlotAllocator(ONE_SLOT, Workers().load)
    own = AsyncExitStack()
    lease = await own.enter_async_context(slots.lease(program(0)))
    waiter = asyncio.create_task(use(slots, program(1)))
    await turns()

    with lease.share():
        await own.aclose()
        await turns()
        assert not waiter.done()
    await asyncio.wait_for(waiter, LIMIT_S)
