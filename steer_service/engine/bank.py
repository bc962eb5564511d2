"""Programs on the device and the slots they stand in.

The front end owns the slots (`SlotAllocator`): reference counts, least recently used idle ones evicted, arrival order
when full. Each worker holds the tables (`ProgramBank`) that the kernel reads. L: layers held by the worker; S: slots;
K: operations of one layer; W: rows of the bank, one operation each; D: hidden size.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from steer_service.core.errors import Overloaded
from steer_service.ops.program import COEFFICIENTS, Program, program_from_bytes, program_to_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BankSize:
    """How much a bank holds."""

    slots: int
    """Distinct programs at once."""
    rows: int
    """Operations of all programs together."""
    operations_per_layer: int
    """Operations of one program at one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramLoad:
    """One change of the bank, sent to the workers: `slot` now holds this program."""

    slot: int
    """The place."""
    digest: str
    """Digest of the program; "" empties the slot."""
    data: bytes
    """`program_to_bytes` of it; b"" empties the slot."""


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
    """Where it stands."""
    digest: str
    """What it is."""


class SlotAllocator:
    """Decides which program stands in which slot; waits in arrival order when the bank is full."""

    def __init__(self, size: BankSize, load: Callable[[Sequence[ProgramLoad]], Awaitable[None]]) -> None:
        self._size = size
        self._load = load
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # digest -> entry, least recently used first
        self._free_slots = list(range(size.slots - 1, -1, -1))
        self._free_rows = size.rows
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._outbox: list[ProgramLoad] = []
        self._unsure: set[int] = set()  # slots of a message that failed: the workers may hold the old or the new
        self._sender: asyncio.Task[None] | None = None

    @property
    def resident(self) -> int:
        """Programs in the bank now, idle ones included."""
        return len(self._entries)

    @property
    def waiting(self) -> bool:
        """True while at least one request waits for room."""
        return self._turn.locked()

    def find(self, digest: str) -> Program | None:
        """The program with this digest while it is in the bank; None afterwards."""
        entry = self._entries.get(digest)
        return entry.program if entry is not None else None

    @asynccontextmanager
    async def lease(self, program: Program) -> AsyncIterator[ProgramLease]:
        """The program, loaded on every worker, for the duration of the block.

        Waits while the bank is full of programs in use; raises Overloaded for a program that can never fit.
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
        """Sends what has gathered in one message, again until nothing is left; a step passes between two messages."""
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
                entry.loaded.exception()  # a requester that went away must not leave a warning behind
            if not isinstance(error, Exception):
                raise
        else:
            self._unsure = set()
            for entry in mine:
                entry.loaded.set_result(None)

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.program.digest) is not entry:
            return  # its requester went away and it was evicted meanwhile
        del self._entries[entry.program.digest]
        self._free_slots.append(entry.slot)
        self._free_rows += entry.program.operation_count
        self._room.set()


def _emptied(slot: int) -> ProgramLoad:
    return ProgramLoad(slot=slot, digest="", data=b"")


class FreeRows:
    """Rows of the bank that hold nothing, those near each other for the same layer.

    What one layer reads of all programs then lies side by side: memory is read twice as fast as in pieces far apart.
    """

    def __init__(self, count: int, layers: Sequence[int]) -> None:
        self._share = -(-count // max(1, len(layers)))
        self._shares = {layer: index for index, layer in enumerate(layers)}
        starts = range(0, count, self._share)
        self._free = [list(range(start, min(start + self._share, count)))[::-1] for start in starts]

    def take(self, layer: int, count: int) -> list[int]:
        """So many rows, of the layer's share while it lasts; there must be as many."""
        rows: list[int] = []
        mine = self._shares[layer]
        while len(rows) < count:
            free = self._free[mine] if mine < len(self._free) and self._free[mine] else max(self._free, key=len)
            rows.append(free.pop())
        return rows

    def give_back(self, rows: Sequence[int]) -> None:
        """They hold nothing any more."""
        for row in reversed(rows):
            self._free[row // self._share].append(row)


class ProgramBank:
    """The tables of one worker: for each layer and slot, which rows of the bank to run in which order."""

    def __init__(self, size: BankSize, layers: Sequence[int], layer_count: int, hidden_size: int) -> None:
        self.op_rows_LSK = np.zeros((layer_count, size.slots, size.operations_per_layer), np.int32)
        """Rows of `directions` and `coefficients`, in order."""
        self.op_counts_LS = np.zeros((layer_count, size.slots), np.int32)
        """How many of them count."""
        self.directions_WD = np.zeros((size.rows, hidden_size), np.float32)
        """One direction per operation."""
        self.coefficients_WC = np.zeros((size.rows, COEFFICIENTS), np.float32)
        """a, b, lo, hi per operation."""
        self._layers = frozenset(layers)
        self._hidden_size = hidden_size
        self._digests = [""] * size.slots
        self._free_rows = FreeRows(size.rows, layers)

    def load(self, load: ProgramLoad) -> None:
        """Puts one program in its slot, in place of what was there; only layers this worker holds take rows."""
        self._clear(load.slot)
        if not load.digest:
            return
        program = program_from_bytes(load.data, self._hidden_size)
        for layer, part in program.layers.items():
            if layer in self._layers:
                rows = self._free_rows.take(layer, len(part.coefficients))
                self.directions_WD[rows] = part.directions
                self.coefficients_WC[rows] = part.coefficients
                self.op_rows_LSK[layer, load.slot, : len(rows)] = rows
                self.op_counts_LS[layer, load.slot] = len(rows)
        self._digests[load.slot] = load.digest

    def holds(self, slot: int, digest: str) -> bool:
        """True if `slot` holds the program with this digest."""
        return 0 <= slot < len(self._digests) and self._digests[slot] == digest

    def digest_of(self, slot: int) -> str:
        """Digest of the program in `slot`; "" if it is empty."""
        return self._digests[slot]

    def _clear(self, slot: int) -> None:
        for layer in self._layers:
            count = self.op_counts_LS[layer, slot]
            self._free_rows.give_back(self.op_rows_LSK[layer, slot, :count].tolist())
            self.op_counts_LS[layer, slot] = 0
        self._digests[slot] = ""
