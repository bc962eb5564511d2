"""The bounded queue in front of the engine, fair between clients.

The engine computes a limited number of requests at once and serves the others in the order in which they came. A client
that sends a thousand would keep all others waiting. So the server hands over only as many as the engine computes, and
the next is always one of the client that has the fewest running. While several clients are there, a few places are kept
for those that have none running: they need not wait until a request of another client ends.
"""

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, fields, replace

from steer_service.core.errors import Overloaded

OTHERS_S = 60.0
"""Seconds after its last request for which a client counts as being there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a request weighs while it waits, or what all that wait may weigh together."""

    requests: int = 1
    """Requests."""
    bytes: int = 0
    """Bytes of their messages."""
    tokens: int = 0
    """Tokens of their prompts: exact for token ids, a quarter of the bytes of a text."""


UNITS = tuple(field.name for field in fields(Load))


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiter:
    share: str
    load: Load
    ready: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Is done once it has a place or was refused; cancelled with the task that waits for it."""
    is_queued: bool = False


@dataclass(slots=True)
class _Client:
    """The requests of one client."""

    running: int = 0
    waiting: "deque[_Waiter]" = field(default_factory=deque)
    weight: dict[str, int] = field(default_factory=lambda: dict.fromkeys(UNITS, 0))
    """What its waiting requests weigh, by unit."""


class FairQueue:
    """Gives places to requests; when none is free, they wait. There are none before `open`.

    `most`: what may wait. `most_of_client`: requests that a client may have, running and waiting; 0 for no limit of its
    own. A request takes the turn of one client, and counts for the quota of one, which may differ. `clock` returns
    seconds.
    """

    def __init__(
        self,
        *,
        most: Load,
        most_of_client: Callable[[str], int],
        retry_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = 0
        self._common = 0
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()  # the two clients that came last: when
        self._most = most
        self._most_of_client = most_of_client
        self._retry_after_s = retry_after_s
        self._counts: Counter[str] = Counter()  # client -> requests that count for its quota
        self._clients: OrderedDict[str, _Client] = OrderedDict()  # served or come last: last
        self._running = 0
        self._waiting = dict.fromkeys(UNITS, 0)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self._waiting["requests"]

    async def wait_idle(self) -> None:
        """Returns when no request runs or waits."""
        await self._idle.wait()

    def open(self, places: int, most: int, common: int | None = None) -> None:
        """Gives out `places` from now on; as many requests wait as `most` leaves.

        `common`: while several clients are there, those that have running requests get places only up to this number
        of running requests. Default: all places.
        """
        self._places = places
        self._common = places if common is None else common
        self._most = replace(self._most, requests=most - places)
        self._start_waiting()

    def check_room(self, share: str, *, quota_of: str = "") -> None:
        """Raises Overloaded if `place` would now, whatever the request weighs: before anything is read of it."""
        client = self._clients.get(share) or _Client()
        self._check_quota(quota_of or share)
        if self.waiting >= self._most.requests and not self._has_room(client):
            self._to_refuse_for(client, "requests", 1)

    @asynccontextmanager
    async def place(self, share: str, load: Load, *, quota_of: str = "") -> AsyncIterator[None]:
        """A place for the duration of the block; waits for it. Raises Overloaded (QUEUE_FULL, CLIENT_QUOTA).

        `share`: whose turn it takes. `quota_of`: the client for whose quota it counts; by default the same.
        """
        with self._counted(quota_of or share):
            async with self._placed(share, load):
                yield

    @asynccontextmanager
    async def _placed(self, share: str, load: Load) -> AsyncIterator[None]:
        client = self._clients.setdefault(share, _Client())
        try:
            self._note_seen(share)
            self._start_waiting()  # places are no longer kept for a client that did not come again
            if self._has_room(client):  # then nobody waits who comes before
                self._start(share)
            else:
                await self._wait(_Waiter(share=share, load=load))
        except BaseException:
            self._forget_idle(share)
            raise
        try:
            yield
        finally:
            self._end(share)

    def _note_seen(self, share: str) -> None:
        self._seen[share] = self._clock()
        self._seen.move_to_end(share)
        if len(self._seen) > 2:
            self._seen.popitem(last=False)

    def _has_room(self, client: _Client) -> bool:
        """True if there is a place for a request of this client."""
        if not client.running or len(self._seen) < 2:
            return self._running < self._places
        is_alone = self._clock() - next(iter(self._seen.values())) > OTHERS_S
        return self._running < (self._places if is_alone else self._common)

    @contextmanager
    def _counted(self, client: str) -> Iterator[None]:
        """Counts a request for a client's quota; raises Overloaded (CLIENT_QUOTA)."""
        self._check_quota(client)
        self._counts[client] += 1
        try:
            yield
        finally:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]

    def _check_quota(self, client: str) -> None:
        count, most = self._counts[client], self._most_of_client(client)
        if 0 < most <= count:
            raise Overloaded(
                f"{count} requests of this client run or wait, at most {most}",
                reason="CLIENT_QUOTA",
                retry_after_s=self._retry_after_s,
            )

    async def _wait(self, waiter: _Waiter) -> None:
        self._make_room(waiter)
        self._clients[waiter.share].waiting.append(waiter)
        self._count(waiter, 1)
        try:
            await waiter.ready
        except BaseException:
            if waiter.is_queued:
                self._remove(waiter)
            elif not waiter.ready.cancelled() and waiter.ready.exception() is None:
                self._end(waiter.share)  # it got its place in the moment in which it was cancelled
            raise

    def _make_room(self, waiter: _Waiter) -> None:
        """Raises Overloaded if the queue is full, unless another client has more in it: then its newest is refused."""
        for unit in UNITS:
            added, most = getattr(waiter.load, unit), getattr(self._most, unit)
            while self._waiting[unit] + added > most:
                heaviest = self._to_refuse_for(self._clients[waiter.share], unit, added)
                self._refuse(heaviest.waiting[-1], self._full(unit, most))

    def _to_refuse_for(self, client: _Client, unit: str, added: int) -> _Client:
        """The client whose newest request makes room; raises Overloaded if none has more in the queue than this one."""
        heaviest = max(self._clients.values(), key=lambda one: one.weight[unit], default=client)
        if heaviest is client or heaviest.weight[unit] <= client.weight[unit] + added:
            raise self._full(unit, getattr(self._most, unit))
        return heaviest

    def _full(self, unit: str, most: int) -> Overloaded:
        what = {"requests": "requests", "bytes": "bytes of requests", "tokens": "tokens of prompts"}[unit]
        return Overloaded(
            f"{self._waiting[unit]} {what} wait for a place, at most {most}",
            reason="QUEUE_FULL",
            retry_after_s=self._retry_after_s,
        )

    def _refuse(self, waiter: _Waiter, error: Overloaded) -> None:
        self._remove(waiter)
        if not waiter.ready.done():
            waiter.ready.set_exception(error)

    def _remove(self, waiter: _Waiter) -> None:
        self._clients[waiter.share].waiting.remove(waiter)
        self._count(waiter, -1)

    def _start(self, share: str) -> None:
        client = self._clients[share]
        client.running += 1
        self._running += 1
        self._clients.move_to_end(share)
        self._idle.clear()

    def _end(self, share: str) -> None:
        self._clients[share].running -= 1
        self._clients.move_to_end(share)
        self._running -= 1
        self._start_waiting()
        self._forget_idle(share)

    def _start_waiting(self) -> None:
        """Gives free places to the clients with the fewest running requests, which take turns."""
        while self._running < self._places and self.waiting:
            share = min(self._with_waiting(), key=lambda one: self._clients[one].running)
            if not self._has_room(self._clients[share]):
                return
            waiter = self._clients[share].waiting[0]
            self._remove(waiter)
            if not waiter.ready.done():  # else its task was cancelled and has not run yet
                self._start(share)
                waiter.ready.set_result(None)

    def _with_waiting(self) -> Iterator[str]:
        return (share for share, client in self._clients.items() if client.waiting)

    def _count(self, waiter: _Waiter, sign: int) -> None:
        waiter.is_queued = sign > 0
        weight = self._clients[waiter.share].weight
        for unit in UNITS:
            amount = sign * getattr(waiter.load, unit)
            self._waiting[unit] += amount
            weight[unit] += amount
        if self.waiting:
            self._idle.clear()

    def _forget_idle(self, share: str) -> None:
        client = self._clients.get(share)
        if client is not None and not client.running and not client.waiting:
            del self._clients[share]
        if not self._running and not self.waiting:
            self._idle.set()
