"""Which program is in which slot of the bank.

The API server process owns the slots and counts the users of each program. Each worker holds the bank itself, see
`worker.bank`. A program that is not in the bank replaces idle ones, the least recently used first. If they are not
enough, its requests wait:

1. Programs wait in the order in which they were first asked for. All requests for one program wait together.
2. A waiting program claims the programs of the bank that it will replace, those with the fewest users first. A claimed
   program gets no new users, so the wait ends when its present users leave. If other programs become idle first, the
   oldest waiting program replaces them instead and drops its claims.
3. Requests for programs of the bank that are not claimed are served at once, whoever waits.
4. A later program overtakes an earlier one only if the earlier one's claims stay enough for it.

A stream of requests can therefore keep no program waiting longer than the requests that ran when it was asked for,
and those of the programs that waited before it.
"""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from steer_service.core.errors import InvalidRequest
from steer_service.core.usage import BankUsage
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
    claimant: "_Waiter | None" = None  # the waiting program that will replace this one


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiter:
    """A program that is not in the bank or is claimed there, with the requests that wait for it."""

    number: int  # in order of arrival
    program: Program
    requests: "list[asyncio.Future[_Entry]]" = field(default_factory=list)
    claims: list[_Entry] = field(default_factory=list)
    rows: int = 0  # free rows that are set aside for it
    is_provided: bool = False  # its claims and its rows will be enough


@dataclass(frozen=True, slots=True, eq=False)
class ProgramLease:
    """The right to use a loaded program until the lease's block and all its shares have ended."""

    slot: int
    """The program's slot."""
    program: Program
    """The program."""
    share: Callable[[], ExitStack]
    """Extends the lease until the stack that it returns is closed. Call it before the lease's block ends."""

    @property
    def digest(self) -> str:
        """The program's digest."""
        return self.program.digest


class SlotAllocator:
    """Assigns slots to programs; requests for programs that find no room wait."""

    def __init__(self, size: BankSize, load: Callable[[Sequence[ProgramLoad]], Awaitable[None]]) -> None:
        self._size = size
        self._load = load
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # digest -> entry, least recently used first
        self._waiters: dict[str, _Waiter] = {}  # digest -> waiting program, in order of arrival
        self._numbers = itertools.count()
        self._free_slots = list(range(size.slots - 1, -1, -1))
        self._free_rows = size.rows  # without those set aside for waiting programs
        self._outbox: list[ProgramLoad] = []
        self._unsure: set[int] = set()  # slots of a message that failed: workers may hold the old or the new program
        self._sender: asyncio.Task[None] | None = None

    @property
    def resident(self) -> int:
        """Number of programs in the bank, with idle ones."""
        return len(self._entries)

    @property
    def waiting(self) -> int:
        """Number of programs that wait for room in the bank."""
        return len(self._waiters)

    def usage(self) -> BankUsage:
        """How full the bank is; may be called in any thread."""
        entries, waiters = list(self._entries.values()), list(self._waiters.values())
        used, idle = [one for one in entries if one.users], [one for one in entries if not one.users]
        return BankUsage(
            slots=self._size.slots,
            slots_used=len(used),
            slots_idle=len(idle),
            operations=self._size.rows,
            operations_used=_rows_of(used),
            operations_idle=_rows_of(idle),
            waiting_requests=sum(len(one.requests) for one in waiters),
        )

    def find(self, digest: str) -> Program | None:
        """The program with this digest; None if it is not in the bank."""
        entry = self._entries.get(digest)
        return entry.program if entry is not None else None

    @asynccontextmanager
    async def lease(self, program: Program) -> AsyncIterator[ProgramLease]:
        """Keeps the program loaded on every worker for the duration of the block.

        Waits while there is no room for the program in the bank. Raises InvalidRequest for a program that can never
        fit.
        """
        if program.operation_count > self._size.rows:
            raise InvalidRequest(
                f"the program holds {program.operation_count} operations, the bank {self._size.rows}",
                reason="PROGRAM_TOO_LARGE",
                field="steering",
            )
        entry = await self._pin(program)
        try:
            await asyncio.shield(entry.loaded)
            yield ProgramLease(entry.slot, entry.program, partial(self._share, entry))
        finally:
            self._unpin(entry)

    def _share(self, entry: _Entry) -> ExitStack:
        entry.users += 1
        stack = ExitStack()
        stack.callback(self._unpin, entry)
        return stack

    async def _pin(self, program: Program) -> _Entry:
        entry = self._entries.get(program.digest)
        if entry is not None and entry.claimant is None:
            return self._use(entry)
        waiter = self._waiters.get(program.digest)
        if waiter is None:
            waiter = self._waiters[program.digest] = _Waiter(number=next(self._numbers), program=program)
        request: asyncio.Future[_Entry] = asyncio.get_running_loop().create_future()
        waiter.requests.append(request)
        self._serve(waiter)
        try:
            return await request
        except asyncio.CancelledError:
            self._give_up(waiter, request)
            raise

    def _give_up(self, waiter: _Waiter, request: "asyncio.Future[_Entry]") -> None:
        if not request.cancelled():  # it was served in the same turn of the loop
            self._unpin(request.result())
            return
        waiter.requests.remove(request)
        if not waiter.requests and self._waiters.get(waiter.program.digest) is waiter:
            del self._waiters[waiter.program.digest]
            self._drop_claims(waiter)
            self._serve_all()

    def _use(self, entry: _Entry) -> _Entry:
        entry.users += 1
        self._entries.move_to_end(entry.program.digest)
        return entry

    def _unpin(self, entry: _Entry) -> None:
        entry.users -= 1
        if entry.users == 0:
            if self._entries.get(entry.program.digest) is entry:
                self._entries.move_to_end(entry.program.digest)
            self._serve_all()

    def _serve_all(self) -> None:
        """Serves waiting programs in order. Each that is served may drop claims, so the next search begins again."""
        while self._serve_next():
            pass

    def _serve_next(self) -> bool:
        has_room = True
        for waiter in self._waiters.values():
            is_resident = waiter.program.digest in self._entries
            if (has_room or is_resident) and self._serve(waiter):
                return True
            has_room = has_room and (is_resident or waiter.is_provided)  # else it has claimed all that there was
        return False

    def _serve(self, waiter: _Waiter) -> bool:
        """Serves the requests of a waiting program if it is in the bank or finds room there; False if they wait."""
        entry = self._entries.get(waiter.program.digest)
        if entry is None and self._make_room(waiter):
            entry = self._place(waiter.program)
        if entry is None or entry.claimant is not None:
            return False
        del self._waiters[waiter.program.digest]
        for request in waiter.requests:
            if not request.done():
                request.set_result(self._use(entry))
        return True

    def _make_room(self, waiter: _Waiter) -> bool:
        """Evicts idle programs until the waiting one fits; False if they are not enough. It then claims programs."""
        needed = waiter.program.operation_count
        idle = [entry for entry in self._entries.values() if entry.users == 0 and _may_take(waiter, entry)]
        if not (self._free_slots or idle) or self._free_rows + waiter.rows + _rows_of(idle) < needed:
            if not waiter.is_provided:
                self._claim(waiter)
            return False
        self._drop_claims(waiter)
        while not self._free_slots or self._free_rows < needed:
            self._evict(idle.pop(0))
        return True

    def _claim(self, waiter: _Waiter) -> None:
        """Claims what the program will replace and sets rows aside; as much as there is, if that is not enough yet."""
        needed = waiter.program.operation_count
        self._free_rows += waiter.rows

        def is_enough(claims: Sequence[_Entry]) -> bool:
            return bool(claims) and self._free_rows + _rows_of(claims) >= needed

        unclaimed = [entry for entry in reversed(self._entries.values()) if entry.claimant is None]
        unclaimed.sort(key=lambda entry: entry.users, reverse=True)  # the last one has the fewest users
        claims = waiter.claims
        while unclaimed and not is_enough(claims):
            claims.append(unclaimed.pop())
        for entry in list(claims):
            rest = [other for other in claims if other is not entry]
            entry.claimant = None if is_enough(rest) else waiter  # None if a later claim was larger
            if entry.claimant is None:
                claims.remove(entry)
        missing = needed - _rows_of(claims)
        waiter.rows = max(0, min(self._free_rows, missing))
        waiter.is_provided = bool(claims) and waiter.rows >= missing
        self._free_rows -= waiter.rows

    def _drop_claims(self, waiter: _Waiter) -> None:
        for entry in waiter.claims:
            entry.claimant = None
        self._free_rows += waiter.rows
        waiter.claims, waiter.rows, waiter.is_provided = [], 0, False

    def _evict(self, entry: _Entry) -> None:
        self._remove(entry)
        self._outbox.append(_emptied(entry.slot))

    def _place(self, program: Program) -> _Entry:
        entry = _Entry(slot=self._free_slots.pop(), program=program)
        self._free_rows -= program.operation_count
        self._entries[program.digest] = entry
        self._outbox.append(ProgramLoad(slot=entry.slot, digest=program.digest, data=program_to_bytes(program)))
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send())
        return entry

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
        self._remove(entry)
        self._serve_all()

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.program.digest]
        self._free_slots.append(entry.slot)
        self._free_rows += entry.program.operation_count
        if entry.claimant is not None:
            entry.claimant.claims.remove(entry)
            entry.claimant.is_provided = False


def _may_take(waiter: _Waiter, entry: _Entry) -> bool:
    """False if an earlier waiting program has claimed the entry."""
    return entry.claimant is None or entry.claimant.number >= waiter.number


def _rows_of(entries: Iterable[_Entry]) -> int:
    return sum(entry.program.operation_count for entry in entries)


def _emptied(slot: int) -> ProgramLoad:
    return ProgramLoad(slot=slot, digest="", data=b"")
