"""Workers for tests of the slot allocator: a real ProgramBank to which its messages are applied one after the other."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from steer_service.core.errors import EngineFailed
from steer_service.engine.slots import BankSize, ProgramLease, ProgramLoad, SlotAllocator
from steer_service.engine.worker.bank import ProgramBank
from steer_service.ops.program import Program
from tests.engine.bank_contents import LAYERS, SIZE, WIDTH

LIMIT_S = 20


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
