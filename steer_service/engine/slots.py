"""Which program is in which slot of the bank.

The API server process owns the slots and counts the users of each program. If the bank is full, the least recently used
idle programs are evicted. If no program is idle, requests wait in arrival order. Each worker holds the bank itself, see
`worker.bank`.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from steer_service.core.errors import Overloaded
from steer_service.ops.program import Program, program_to_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BankSize:
    """The size of a bank."""

    slots: int
    """Largest number of distinct programs."""
    rows: int
    """Largest number of operations, of all programs together."""
    operations_per_layer: int
    """Largest number of operations of one program at one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramLoad:
    """One change of the bank, sent to the workers: `slot` now holds this program."""

    slot: int
    """Number of the slot, from 0."""
    digest: str
    """Digest of the program; "" empties the slot."""
    data: bytes
    """The program, from `program_to_bytes`; b"" empties the slot."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    slot: int
    program: Program
    users: int = 0
    loaded: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, slots=True)
class ProgramLease:
    """The right to use a loaded program until the lease's block ends."""

    slot: int
    """The program's slot."""
    digest: str
    """The program's digest."""


class SlotAllocator:
    """Assigns slots to programs; when the bank is full, requests wait in arrival order."""

    def __init__(self, size: BankSize, load: Callable[[Sequence[ProgramLoad]], Awaitable[None]]) -> None:
        self._size = size
        self._load = load
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # digest -> entry, least recently used first
        self._free_slots = list(range(size.slots - 1, -1, -1))
        self._free_rows = size.rows
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._outbox: list[ProgramLoad] = []
        self._unsure: set[int] = set()  # slots of a message that failed: workers may hold the old or the new program
        self._sender: asyncio.Task[None] | None = None

    @property
    def resident(self) -> int:
        """Number of programs in the bank, with idle ones."""
        return len(self._entries)

    @property
    def waiting(self) -> bool:
        """True while at least one request waits for a slot."""
        return self._turn.locked()

    def find(self, digest: str) -> Program | None:
        """The program with this digest; None if it is not in the bank."""
        entry = self._entries.get(digest)
        return entry.program if entry is not None else None

    @asynccontextmanager
    async def lease(self, program: Program) -> AsyncIterator[ProgramLease]:
        """Keeps the program loaded on every worker for the duration of the block.

        Waits while the bank is full of programs in use. Raises Overloaded for a program that can never fit.
        """
        if program.operation_count > self._size.rows:
            raise Overloaded(
                f"the program holds {program.operation_count} operations, the bank {self._size.rows}",
                reason="PROGRAM_TOO_LARGE",
            )
        entry = await self._pin(program)
        try:
            await asyncio.shield(entry.loaded)
            yield ProgramLease(entry.slot, program.digest)
        finally:
            self._unpin(entry)

    async def _pin(self, program: Program) -> _Entry:
        if not self._turn.locked() and program.digest in self._entries:
            return self._use(self._entries[program.digest])
        async with self._turn:  # asyncio.Lock serves in arrival order
            while program.digest not in self._entries and not self._make_room(program):
                self._room.clear()
                await self._room.wait()
            if program.digest not in self._entries:
                self._place(program)
            return self._use(self._entries[program.digest])

    def _use(self, entry: _Entry) -> _Entry:
        entry.users += 1
        self._entries.move_to_end(entry.program.digest)
        return entry

    def _unpin(self, entry: _Entry) -> None:
        entry.users -= 1
        if entry.users == 0:
            if self._entries.get(entry.program.digest) is entry:
                self._entries.move_to_end(entry.program.digest)
            self._room.set()

    def _make_room(self, program: Program) -> bool:
        """Evicts idle programs, oldest first, until `program` fits; evicts nothing if it cannot."""
        idle = [entry for entry in self._entries.values() if entry.users == 0]
        rows_within_reach = self._free_rows + sum(entry.program.operation_count for entry in idle)
        if not (self._free_slots or idle) or rows_within_reach < program.operation_count:
            return False
        while not self._free_slots or self._free_rows < program.operation_count:
            self._evict(idle.pop(0))
        return True

    def _evict(self, entry: _Entry) -> None:
        del self._entries[entry.program.digest]
        self._free_slots.append(entry.slot)
        self._free_rows += entry.program.operation_count
        self._outbox.append(_emptied(entry.slot))

    def _place(self, program: Program) -> None:
        entry = _Entry(slot=self._free_slots.pop(), program=program)
        self._free_rows -= program.operation_count
        self._entries[program.digest] = entry
        self._outbox.append(ProgramLoad(slot=entry.slot, digest=program.digest, data=program_to_bytes(program)))
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        """Sends all waiting changes in one message, until none are left; a step runs between two messages."""
        try:
            while self._outbox:
                loads, self._outbox = [*map(_emptied, sorted(self._unsure)), *self._outbox], []
                placed = [entry for entry in self._entries.values() if not entry.loaded.done()]
                await self._deliver(loads, {load.digest for load in loads}, placed)
        finally:
            self._sender = None

    async def _deliver(self, loads: Sequence[ProgramLoad], digests: set[str], placed: Sequence[_Entry]) -> None:
        mine = [entry for entry in placed if entry.program.digest in digests]
        try:
            await self._load(loads)
        except BaseException as error:
            self._unsure = {load.slot for load in loads}
            for entry in mine:
                self._forget(entry)
                entry.loaded.set_exception(error)
                entry.loaded.exception()  # marks it as read: if no request waits, asyncio must not warn
            if not isinstance(error, Exception):
                raise
        else:
            self._unsure = set()
            for entry in mine:
                entry.loaded.set_result(None)

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.program.digest) is not entry:
            return  # its request was cancelled and it was evicted meanwhile
        del self._entries[entry.program.digest]
        self._free_slots.append(entry.slot)
        self._free_rows += entry.program.operation_count
        self._room.set()


def _emptied(slot: int) -> ProgramLoad:
    return ProgramLoad(slot=slot, digest="", data=b"")
