"""Whatever order requests come, leave and fail in, a lease means that the workers hold the program."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from steer_service.core.errors import EngineFailed
from steer_service.engine.slots import ProgramLease, SlotAllocator
from steer_service.ops.program import Program
from tests.engine.bank_contents import PROGRAMS, SIZE, assert_holds, assert_rows_are_not_shared, program
from tests.engine.fake_workers import LIMIT_S, Workers, turns


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
def test_a_lease_always_means_that_the_workers_hold_the_program(
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
def test_without_failures_and_cancellations_every_request_is_served(visits: list[Visit], message_turns: int) -> None:
    async def run() -> None:
        workers = Workers()
        workers.turns = message_turns
        traffic = Traffic(workers)

        await traffic.run([Visit(visit.program, visit.comes_after, visit.stays_for, None) for visit in visits])

        assert (traffic.served, traffic.failed) == (len(visits), 0)

    asyncio.run(run())
