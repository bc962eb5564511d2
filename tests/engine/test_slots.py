"""The bank: one program per slot while it is used, what was asked first is served first, and nothing leaks.

The workers are played by a real ProgramBank to which the allocator's messages are applied one after the other.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_service.core.errors import EngineFailed, Overloaded
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.engine.slots import BankSize, ProgramLease, ProgramLoad, SlotAllocator
from steer_service.engine.worker.bank import ProgramBank
from steer_service.ops.program import Program, compile_program, program_to_bytes

LIMIT_S = 20
LAYERS = 3
WIDTH = 4
SIZE = BankSize(slots=3, rows=6, operations_per_layer=6)


def program(number: int, operations: int = 1, layer: int = 0) -> Program:
    """A program that no other number gives, of so many operations at one layer."""
    adds = [AddSpec(np.full(WIDTH, 1.0 + number), 1.0 + index) for index in range(operations)]
    return compile_program(SteeringSpec(layers={layer: LayerSteeringSpec(operations=adds)}))


class Workers:
    """Applies the messages they are sent to a bank, each after some turns of the loop; some messages fail."""

    def __init__(self, size: BankSize = SIZE) -> None:
        self.bank = ProgramBank(size, layers=range(LAYERS), layer_count=LAYERS, hidden_size=WIDTH)
        self.messages: list[list[ProgramLoad]] = []
        self.turns = 0
        """Turns of the loop that a message takes."""
        self.failures: list[int | None] = []
        """For the next messages: after how many of its changes it fails, or None if it does not."""
        self.open = asyncio.Event()
        """Messages wait for it."""
        self.open.set()
        self.arrived = asyncio.Event()
        """Set when a message has arrived."""

    async def load(self, loads: Sequence[ProgramLoad]) -> None:
        self.messages.append(list(loads))
        self.arrived.set()
        await self.open.wait()
        for _ in range(self.turns):
            await asyncio.sleep(0)
        fails_after = self.failures.pop(0) if self.failures else None
        self.apply(loads[:fails_after])
        if fails_after is not None:
            raise EngineFailed("the workers did not answer")

    def apply(self, loads: Sequence[ProgramLoad]) -> None:
        for load in loads:
            self.bank.load(load)

    def placed(self) -> list[str]:
        """Digests in the order in which they were sent."""
        return [load.digest for message in self.messages for load in message if load.digest]


def rows_in(bank: ProgramBank, layer: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions and coefficients that the kernel would run."""
    rows = bank.op_rows_LSK[layer, slot, : bank.op_counts_LS[layer, slot]]
    return bank.directions_WD[rows], bank.coefficients_WC[rows]


def assert_holds(bank: ProgramBank, slot: int, wanted: Program) -> None:
    """The slot holds exactly this program, at every layer."""
    assert bank.holds(slot, wanted.digest)
    for layer in range(LAYERS):
        directions, coefficients = rows_in(bank, layer, slot)
        part = wanted.layers.get(layer)
        assert directions.tolist() == ([] if part is None else part.directions.tolist())
        assert coefficients.tolist() == ([] if part is None else part.coefficients.tolist())


def assert_rows_are_not_shared(bank: ProgramBank) -> None:
    used = [
        row
        for layer in range(bank.op_counts_LS.shape[0])
        for slot in range(bank.op_counts_LS.shape[1])
        for row in bank.op_rows_LSK[layer, slot, : bank.op_counts_LS[layer, slot]]
    ]
    assert len(used) == len(set(used))


@asynccontextmanager
async def hold(slots: SlotAllocator, *programs: Program) -> AsyncIterator[list[ProgramLease]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(slots.lease(one)) for one in programs]


async def use(slots: SlotAllocator, one: Program) -> None:
    async with slots.lease(one):
        pass


async def turns(count: int = 20) -> None:
    """Lets everything that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


# -- any interleaving ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One request: when it comes, what it asks for, how long it stays and whether it is cancelled."""

    program: int
    comes_after: int
    stays_for: int
    cancelled_after: int | None


VISITS = st.builds(
    Visit,
    program=st.integers(0, 5),
    comes_after=st.integers(0, 12),
    stays_for=st.integers(0, 6),
    cancelled_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
)
PROGRAMS = [program(number, operations=1 + number % 4, layer=number % LAYERS) for number in range(6)]


class Traffic:
    """Sends visitors to an allocator and checks at every lease that the workers agree."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.slots = SlotAllocator(SIZE, workers.load)
        self.in_use: dict[int, list[str]] = {}
        self.served = 0
        self.failed = 0

    async def run(self, visits: Sequence[Visit]) -> None:
        async with asyncio.timeout(LIMIT_S):
            visitors = [asyncio.create_task(self.visit(visit)) for visit in visits]
            cancels = [asyncio.create_task(self.cancel(*pair)) for pair in zip(visitors, visits, strict=True)]
            await asyncio.gather(*visitors, *cancels, return_exceptions=True)
        for visitor, visit in zip(visitors, visits, strict=True):
            if visitor.cancelled():
                assert visit.cancelled_after is not None
            else:
                visitor.result()

    async def visit(self, visit: Visit) -> None:
        await turns(visit.comes_after)
        wanted = PROGRAMS[visit.program]
        try:
            async with self.slots.lease(wanted) as lease:
                self.check(lease, wanted)
                users = self.in_use.setdefault(lease.slot, [])
                users.append(lease.digest)
                try:
                    for _ in range(visit.stays_for):
                        await asyncio.sleep(0)
                        self.check(lease, wanted)
                finally:
                    users.remove(lease.digest)
                self.served += 1
        except EngineFailed:
            self.failed += 1

    def check(self, lease: ProgramLease, wanted: Program) -> None:
        assert lease.digest == wanted.digest
        assert set(self.in_use.get(lease.slot, ())) <= {wanted.digest}
        assert_holds(self.workers.bank, lease.slot, wanted)
        assert_rows_are_not_shared(self.workers.bank)

    async def cancel(self, visitor: "asyncio.Task[None]", visit: Visit) -> None:
        if visit.cancelled_after is not None:
            await turns(visit.comes_after + visit.cancelled_after)
            visitor.cancel()


@settings(max_examples=150)
@given(st.lists(VISITS, max_size=14), st.integers(0, 4), st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=6))
def test_whoever_comes_and_goes_a_lease_means_that_the_workers_hold_the_program(
    visits: list[Visit], message_turns: int, failures: list[int | None]
) -> None:
    async def run() -> None:
        workers = Workers()
        workers.turns, workers.failures = message_turns, list(failures)
        traffic = Traffic(workers)

        await traffic.run(visits)

        workers.failures.clear()
        async with asyncio.timeout(LIMIT_S):  # afterwards nothing is taken: each program, and one that needs all rows
            for wanted in [*PROGRAMS, program(99, operations=SIZE.rows)]:
                async with traffic.slots.lease(wanted) as lease:
                    traffic.check(lease, wanted)
        assert traffic.slots.resident == 1
        assert not traffic.slots.waiting

    asyncio.run(run())


@given(st.lists(VISITS, min_size=1, max_size=10), st.integers(0, 4))
def test_without_failures_and_cancellations_everybody_is_served(visits: list[Visit], message_turns: int) -> None:
    async def run() -> None:
        workers = Workers()
        workers.turns = message_turns
        traffic = Traffic(workers)

        await traffic.run([Visit(visit.program, visit.comes_after, visit.stays_for, None) for visit in visits])

        assert (traffic.served, traffic.failed) == (len(visits), 0)

    asyncio.run(run())


# -- who gets which slot ---------------------------------------------------------------------------------------------


async def test_programs_in_use_stand_in_different_slots() -> None:
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

    with pytest.raises(Overloaded, match=f"the program holds {operations} operations, the bank 6") as raised:
        await use(slots, program(0, operations=operations))

    assert raised.value.reason == "PROGRAM_TOO_LARGE"
    assert raised.value.retry_after_s is None
    assert workers.messages == []


# -- a full bank -----------------------------------------------------------------------------------------------------


async def test_a_full_bank_serves_those_who_wait_in_the_order_in_which_they_came() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    served: list[int] = []

    async def visit(number: int) -> None:
        async with slots.lease(program(number)):
            served.append(number)

    async with hold(slots, program(0), program(1), program(2)):
        waiters = [asyncio.create_task(visit(number)) for number in (7, 4, 9, 5)]
        await turns()
        assert served == []
        assert slots.waiting
    await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)

    assert served == [7, 4, 9, 5]
    assert not slots.waiting


async def test_a_small_program_does_not_overtake_a_large_one_that_waits() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    large = AsyncExitStack()

    async with hold(slots, program(0, operations=3)):
        first = asyncio.create_task(large.enter_async_context(slots.lease(program(1, operations=4))))
        second = asyncio.create_task(use(slots, program(2)))
        await turns()
        assert not first.done()
        assert not second.done()
    await asyncio.wait_for(asyncio.gather(first, second), LIMIT_S)
    await large.aclose()


async def test_users_of_a_program_that_is_there_do_not_keep_a_waiter_waiting_for_ever() -> None:
    slots = SlotAllocator(SIZE, Workers().load)
    was_served = asyncio.Event()

    async def large() -> None:
        async with slots.lease(program(1, operations=4)):
            was_served.set()

    async def newcomer() -> None:
        async with slots.lease(program(0, operations=3)):
            await was_served.wait()

    async with hold(slots, program(0, operations=3)):
        waiters = [asyncio.create_task(large()), asyncio.create_task(newcomer())]
        await turns()

    await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)


async def test_a_waiter_that_gives_up_does_not_hold_up_the_others() -> None:
    slots = SlotAllocator(SIZE, Workers().load)

    async with hold(slots, program(0, operations=3)):
        large = asyncio.create_task(use(slots, program(1, operations=4)))
        behind = asyncio.create_task(use(slots, program(2)))
        small = asyncio.create_task(use(slots, program(3)))
        await turns()
        behind.cancel()
        large.cancel()

        await asyncio.wait_for(small, LIMIT_S)  # there was room for it all the time

    assert large.cancelled()
    assert behind.cancelled()


async def test_a_waiter_that_gives_up_as_room_comes_leaves_the_room_to_the_next() -> None:
    slots = SlotAllocator(BankSize(slots=1, rows=1, operations_per_layer=1), Workers().load)
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
    slots = SlotAllocator(BankSize(slots=1, rows=1, operations_per_layer=1), workers.load)

    async with hold(slots, program(0)):
        waiters = [asyncio.create_task(use(slots, program(1))) for _ in range(3)]
        await turns()
    await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)

    assert workers.placed() == [program(0).digest, program(1).digest]


# -- messages to the workers -----------------------------------------------------------------------------------------


async def test_programs_asked_for_at_once_travel_in_one_message() -> None:
    workers = Workers()
    slots = SlotAllocator(SIZE, workers.load)

    await asyncio.gather(*(use(slots, program(number)) for number in range(3)))

    assert [[load.digest for load in message] for message in workers.messages] == [
        [program(number).digest for number in range(3)]
    ]


async def test_what_comes_while_a_message_is_under_way_waits_for_the_next() -> None:
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


# -- messages that fail ----------------------------------------------------------------------------------------------


async def test_a_failed_load_reaches_everybody_who_waits_for_it_and_the_next_attempt_works() -> None:
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
async def test_evictions_in_a_message_that_failed_are_made_up_for_by_the_next(applied: int) -> None:
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


# -- the tables of a worker ------------------------------------------------------------------------------------------


def loaded(bank: ProgramBank, slot: int, one: Program) -> None:
    bank.load(ProgramLoad(slot=slot, digest=one.digest, data=program_to_bytes(one)))


def all_layers(number: int, operations: int) -> Program:
    adds = [AddSpec(np.full(WIDTH, 1.0 + number), 1.0 + index) for index in range(operations)]
    return compile_program(SteeringSpec(layers={layer: LayerSteeringSpec(operations=adds) for layer in range(LAYERS)}))


@given(st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 5))), max_size=30))
def test_slots_hold_what_was_loaded_last_and_no_row_is_lost(changes: list[tuple[int, int | None]]) -> None:
    bank = ProgramBank(BankSize(slots=3, rows=12, operations_per_layer=4), range(LAYERS), LAYERS, WIDTH)
    holding: dict[int, Program] = {}

    for slot, number in changes:
        if number is None:
            bank.load(ProgramLoad(slot=slot, digest="", data=b""))
            holding.pop(slot, None)
        else:
            loaded(bank, slot, PROGRAMS[number])
            holding[slot] = PROGRAMS[number]
        for held, one in holding.items():
            assert_holds(bank, held, one)
        assert_rows_are_not_shared(bank)

    for slot in range(3):
        loaded(bank, slot, program(slot, operations=4))  # all rows are there for new programs


def test_only_layers_that_this_worker_holds_take_rows() -> None:
    bank = ProgramBank(
        BankSize(slots=2, rows=4, operations_per_layer=2), layers=[1], layer_count=LAYERS, hidden_size=WIDTH
    )

    loaded(bank, 0, all_layers(0, operations=2))
    loaded(bank, 1, all_layers(1, operations=2))

    assert bank.op_counts_LS.tolist() == [[0, 0], [2, 2], [0, 0]]
    assert bank.holds(0, all_layers(0, operations=2).digest)
    assert rows_in(bank, 1, 1)[0].tolist() == all_layers(1, operations=2).layers[1].directions.tolist()


def test_what_a_layer_reads_of_all_programs_lies_side_by_side() -> None:
    size = BankSize(slots=3, rows=6 * LAYERS, operations_per_layer=2)
    bank = ProgramBank(size, range(LAYERS), LAYERS, WIDTH)

    for slot in (0, 1, 2, 1):  # the third takes the place of the second, which gives its rows back
        loaded(bank, slot, all_layers(slot, operations=2))

    for layer in range(LAYERS):
        assert bank.op_rows_LSK[layer].ravel().tolist() == list(range(6 * layer, 6 * layer + 6))


def test_a_layer_takes_rows_of_others_when_its_own_are_used_up() -> None:
    bank = ProgramBank(SIZE, range(LAYERS), LAYERS, WIDTH)  # two rows for each of three layers

    loaded(bank, 0, program(0, layer=1, operations=4))

    assert_holds(bank, 0, program(0, layer=1, operations=4))


def test_a_program_with_nothing_for_this_worker_is_held_all_the_same() -> None:
    bank = ProgramBank(SIZE, layers=[2], layer_count=LAYERS, hidden_size=WIDTH)

    loaded(bank, 1, program(0, layer=0))

    assert bank.holds(1, program(0, layer=0).digest)
    assert not bank.op_counts_LS.any()


def test_a_slot_holds_one_digest_and_no_other() -> None:
    bank = ProgramBank(SIZE, range(LAYERS), LAYERS, WIDTH)
    loaded(bank, 1, program(0))

    assert bank.holds(1, program(0).digest)
    assert not bank.holds(0, program(0).digest)
    assert not bank.holds(1, program(1).digest)
    assert not bank.holds(-2, program(0).digest)
    assert not bank.holds(SIZE.slots, program(0).digest)


def test_operations_keep_their_order_in_the_tables() -> None:
    bank = ProgramBank(SIZE, range(LAYERS), LAYERS, WIDTH)
    loaded(bank, 0, program(0, operations=3))
    loaded(bank, 1, program(1, operations=3))
    bank.load(ProgramLoad(slot=0, digest="", data=b""))

    loaded(bank, 0, program(2, operations=3))

    assert rows_in(bank, 0, 0)[0][:, 0].tolist() == [3.0, 6.0, 9.0]
