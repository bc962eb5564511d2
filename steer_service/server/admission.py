"""Which requests run: the reasons to refuse one, its place in the queue, and the table of running requests."""

import asyncio
import hmac
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

from steer_service.core.backend import Backend
from steer_service.core.errors import DeadlineExceeded, EngineFailed, InvalidRequest, SteerError
from steer_service.core.events import Event
from steer_service.core.request import GenerateRequest
from steer_service.core.start_proof import StartProof
from steer_service.server.call_end import CallEnd
from steer_service.server.callers import Caller
from steer_service.server.client_limits import ClientLimits
from steer_service.server.config import ServerConfig
from steer_service.server.fair_queue import FairQueue, Load
from steer_service.server.instance import Instance

HEADROOM_SHARE = 8
"""The engine has more requests than it computes at once, by this part, so that the next is there when one ends."""

KEPT_SHARE = 64
"""While several clients are there, this part of what the engine computes at once is kept for those that run nothing."""

KEPT_FROM = 16
"""An engine that computes fewer requests at once keeps none: one would be too much of it."""

READERS = 2
"""Calls that use the tokenizer at once, each in a thread. One client has only one of them while another is there."""


@dataclass(slots=True, kw_only=True, eq=False)
class ActiveRequest:
    """A running request."""

    request: GenerateRequest
    """The request; its id is never empty."""
    caller: Caller
    """Who sent it."""
    end: CallEnd
    """Ends its call with an error, at any time."""
    cancel_token: bytes
    """The secret with which a client can cancel it."""
    events: AsyncGenerator[Event, None] | None = None
    """The backend's events; set by the handler before it sends anything."""
    _closing: "asyncio.Task[None] | None" = field(default=None, init=False)

    async def aclose(self) -> None:
        """Frees what the request holds in the backend; completes even if the calling task is cancelled meanwhile."""
        if self._closing is None:
            assert self.events is not None
            self._closing = asyncio.ensure_future(_close(self.events))
        await asyncio.shield(self._closing)


async def _close(events: AsyncGenerator[Event, None]) -> None:
    await events.aclose()


class Admission:
    """Admits requests while a backend is open, there is room, and the server does not drain."""

    def __init__(
        self, config: ServerConfig, limits: ClientLimits | None = None, instance: Instance | None = None
    ) -> None:
        """`limits`: of each client; by default those of `config`. `instance`: whose tokens its requests have."""
        self._config = config
        self._instance = instance or Instance(config.instance)
        limits = limits or ClientLimits(config, None)
        self._backend: Backend | None = None
        self._refusal: Callable[[], SteerError] = self._loading
        self._is_draining = False
        self._by_id: dict[tuple[str, str], ActiveRequest] = {}
        self._by_token: dict[bytes, ActiveRequest] = {}
        self._ends: set[CallEnd] = set()
        self._queue = FairQueue(
            most=Load(requests=0, bytes=config.max_queued_bytes, tokens=config.max_queued_tokens),
            most_of_client=limits.requests,
            retry_after_s=config.retry_after_s,
        )
        self._reading = FairQueue(
            most=Load(requests=0, bytes=config.max_queued_bytes),
            most_of_client=limits.requests,
            retry_after_s=config.retry_after_s,
        )

    @property
    def backend(self) -> Backend:
        """The open backend; raises EngineFailed (LOADING, ENGINE_RESTARTING, DRAINING) while there is none."""
        if self._is_draining:
            raise EngineFailed("the server is stopping", reason="DRAINING", retry_after_s=self._config.retry_after_s)
        return self.open_backend

    @property
    def open_backend(self) -> Backend:
        """The open backend, also while the server drains, for requests that were admitted; raises EngineFailed."""
        if self._backend is None:
            raise self._refusal()
        return self._backend

    @property
    def has_priority(self) -> bool:
        """True if requests may have a priority; False while there is no backend."""
        return self._backend is not None and self._backend.has_priority

    @property
    def has_structured_outputs(self) -> bool:
        """True if requests may have structured outputs; False while there is no backend."""
        return self._backend is not None and self._backend.has_structured_outputs

    @property
    def start_proof(self) -> StartProof | None:
        """What the backend proved about itself; None while there is no backend."""
        return self._backend.start_proof if self._backend is not None else None

    @property
    def in_places(self) -> int:
        """Requests that have a place, which the engine has or gets at once."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """The number of running requests."""
        return len(self._by_id)

    def in_engine(self) -> list[GenerateRequest]:
        """The running requests that have reached the backend."""
        return [active.request for active in self._by_id.values() if active.events is not None]

    def open(self, backend: Backend) -> None:
        """Admits requests to `backend` from now on."""
        self._backend = backend
        most, at_once = self._config.max_concurrent_requests, backend.requests_at_once
        places = self._config.max_running_requests or (at_once + at_once // HEADROOM_SHARE + 1 if at_once else most)
        places = min(most, places)
        in_step = min(places, at_once)
        # Without requests beyond what the engine computes, a new one starts at once.
        common = in_step - max(1, in_step // KEPT_SHARE) if in_step >= KEPT_FROM else None
        self._queue.open(places, most, common)
        self._reading.open(READERS, max(most, READERS), READERS - 1)

    def close(self, refusal: Callable[[], SteerError]) -> None:
        """Admits nothing until `open`; `refusal` makes the error of each request that comes meanwhile."""
        self._backend = None
        self._refusal = refusal

    def drain(self) -> None:
        """Admits nothing from now on."""
        self._is_draining = True

    def check_room(self, caller: Caller) -> None:
        """Raises Overloaded if `place` would now, whatever the request weighs; EngineFailed if no backend is open."""
        _ = self.backend
        self._queue.check_room(caller.turn, quota_of=caller.share)

    @asynccontextmanager
    async def place(self, caller: Caller, load: Load, end: CallEnd) -> AsyncIterator[None]:
        """A place among the running requests until the block ends; waits for it, fairly between clients.

        Raises Overloaded if too many wait. The call is ended with DeadlineExceeded when the server's deadline is over.
        """
        with self._ended(end):
            async with self._queue.place(caller.turn, load, quota_of=caller.share):
                yield

    def check_reading_room(self, caller: Caller) -> None:
        """Raises Overloaded if `reading` would now, whatever the call weighs; EngineFailed if no backend is open."""
        _ = self.backend
        self._reading.check_room(caller.turn, quota_of=caller.share)

    @asynccontextmanager
    async def reading(self, caller: Caller, load: Load, end: CallEnd) -> AsyncIterator[None]:
        """A turn with the tokenizer until the block ends; waits for it, fairly between clients. Raises Overloaded.

        The call is ended as one in `place` is.
        """
        with self._ended(end):
            async with self._reading.place(caller.turn, load, quota_of=caller.share):
                yield

    @contextmanager
    def _ended(self, end: CallEnd) -> Iterator[None]:
        """Ends the call of the block when the server's deadline is over, and in `stop_all`."""
        limit_s = self._config.max_deadline_s
        over = DeadlineExceeded(f"the request took longer than the {limit_s:g} s that this server allows")
        timer = asyncio.get_running_loop().call_later(limit_s, end, over)
        self._ends.add(end)
        try:
            yield
        finally:
            timer.cancel()
            self._ends.discard(end)

    @contextmanager
    def admit(self, request: GenerateRequest, caller: Caller, end: CallEnd) -> Iterator[ActiveRequest]:
        """Keeps `request` in the table of running requests until the block ends.

        Raises InvalidRequest (DUPLICATE_REQUEST_ID) if this caller has a running request with its id.
        """
        request = replace(request, request_id=request.request_id or uuid.uuid4().hex)
        key = caller.namespace, request.request_id
        if key in self._by_id:
            raise InvalidRequest("a request with this id is running", reason="DUPLICATE_REQUEST_ID", field="request_id")
        active = self._by_id[key] = ActiveRequest(
            request=request, caller=caller, end=end, cancel_token=self._instance.new_token()
        )
        self._by_token[active.cancel_token] = active
        try:
            yield active
        finally:
            del self._by_id[key]
            del self._by_token[active.cancel_token]

    def cancel(self, token: bytes, caller: Caller) -> bool:
        """Stops the request that has this cancel token; False if none runs. Raises OtherInstance.

        The token is the right to it, unless the request belongs to a client whose name is proven.
        """
        self._instance.check_own(token, "cancel_token")
        active = self._by_token.get(token)
        if active is None or active.end.error is not None:
            return False
        if active.caller.is_authenticated and active.caller.owner != caller.owner:
            return False
        active.end(EngineFailed("the request was cancelled by its token", reason="CANCELLED"))
        return True

    def release_nowait(self, release_token: bytes, owner: str) -> bool:
        """Stops the owner's request that has this release token; False if none is running."""
        is_found = False
        for active in list(self._by_id.values()):
            capture = active.request.capture
            if capture is None or active.caller.owner != owner:
                continue
            if hmac.compare_digest(capture.release_token, release_token):
                active.end(EngineFailed("the client released the captures of this request", reason="CANCELLED"))
                is_found = True
        return is_found

    def stop_all(self, error: SteerError) -> None:
        """Ends every request and every call that uses the tokenizer, waiting ones too, with `error`."""
        for end in list(self._ends):
            end(error)

    async def wait_idle(self) -> None:
        """Returns when no request runs or waits."""
        await self._queue.wait_idle()
        await self._reading.wait_idle()

    def _loading(self) -> SteerError:
        return EngineFailed("the model is loading", reason="LOADING", retry_after_s=self._config.retry_after_s)
