"""Who may come in: one table of the requests under way, and the reasons to refuse another."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, SteerError
from steer_service.core.events import Event
from steer_service.core.request import GenerateRequest
from steer_service.server.config import ServerConfig


@dataclass(slots=True, kw_only=True, eq=False)
class ActiveRequest:
    """A request under way."""

    request: GenerateRequest
    """The request; its id is never empty."""
    task: "asyncio.Task[object]"
    """The task that answers it."""
    cancel_token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    """What a caller must know to cancel it."""
    events: AsyncGenerator[Event, None] | None = None
    """What the backend answers; set by the handler before it sends anything."""
    is_sending: bool = False
    """True while the handler has handed a message to gRPC and waits for a slow reader; kept by the handler."""
    stopped_by: SteerError | None = None
    """Why it was stopped from outside, if it was."""
    _closing: "asyncio.Task[None] | None" = field(default=None, init=False)

    def stop(self, error: SteerError) -> None:
        """Ends the request with `error`, which its caller learns; a second call does nothing."""
        if self.stopped_by is not None:
            return
        self.stopped_by = error
        if self.is_sending:
            # Cancelling the task here would cancel gRPC's own write and leave the caller without a status. The engine
            # is freed now; the handler reports when its reader goes on, or ends with the connection.
            self._begin_closing()
        else:
            self.task.cancel()

    def check_running(self) -> None:
        """Raises the error by which the request was stopped, if it was."""
        if self.stopped_by is not None:
            raise self.stopped_by

    async def aclose(self) -> None:
        """Frees what the request holds in the backend, to the end even if the caller is cancelled meanwhile."""
        await asyncio.shield(self._begin_closing())

    def _begin_closing(self) -> "asyncio.Task[None]":
        if self._closing is None:
            assert self.events is not None
            self._closing = asyncio.ensure_future(_close(self.events))
        return self._closing


async def _close(events: AsyncGenerator[Event, None]) -> None:
    await events.aclose()


class Admission:
    """Admits requests while there is a backend, room, and no intention to stop."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._backend: Backend | None = None
        self._is_draining = False
        self._by_id: dict[str, ActiveRequest] = {}
        self._by_token: dict[str, ActiveRequest] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def backend(self) -> Backend:
        """What serves; raises EngineFailed (LOADING, DRAINING) while nothing does."""
        if self._is_draining:
            raise EngineFailed("the server is stopping", reason="DRAINING", retry_after_s=self._config.retry_after_s)
        if self._backend is None:
            raise EngineFailed("the model is loading", reason="LOADING", retry_after_s=self._config.retry_after_s)
        return self._backend

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._by_id)

    def open(self, backend: Backend) -> None:
        """Admits requests to `backend` from now on."""
        self._backend = backend

    def drain(self) -> None:
        """Admits nothing from now on."""
        self._is_draining = True

    @contextmanager
    def admit(self, request: GenerateRequest) -> Iterator[ActiveRequest]:
        """A active for `request` until the block ends; raises the SteerError that says why there is none.

        Where the block is cancelled because the active was stopped, that error is raised in place of CancelledError.
        """
        active = self._ticket(request)
        self._by_id[active.request.request_id] = active
        self._by_token[active.cancel_token] = active
        self._idle.clear()
        try:
            yield active
        except asyncio.CancelledError:
            if active.stopped_by is None:
                raise
            active.task.uncancel()
            raise active.stopped_by from None
        finally:
            del self._by_id[active.request.request_id]
            del self._by_token[active.cancel_token]
            if not self._by_id:
                self._idle.set()

    def cancel(self, token: str) -> bool:
        """Stops the request whose token this is; False if there is none."""
        active = self._by_token.get(token)
        if active is None or active.stopped_by is not None:
            return False
        active.stop(EngineFailed("the request was cancelled by its token", reason="CANCELLED"))
        return True

    def release_nowait(self, release_token: bytes, client_id: str) -> None:
        """Stops the client's request with this release token, if it is under way."""
        for active in list(self._by_id.values()):
            capture = active.request.capture
            if capture is not None and (capture.release_token, active.request.client_id) == (release_token, client_id):
                active.stop(EngineFailed("its caller released what it captures", reason="CANCELLED"))

    def stop_all(self, error: SteerError) -> None:
        """Stops every request with `error`."""
        for active in list(self._by_id.values()):
            active.stop(error)

    async def wait_idle(self) -> None:
        """Returns when no request is under way."""
        await self._idle.wait()

    def _ticket(self, request: GenerateRequest) -> ActiveRequest:
        _ = self.backend  # raises while nothing serves
        if len(self._by_id) >= self._config.max_concurrent_requests:
            raise Overloaded(
                f"{len(self._by_id)} requests are under way, at most {self._config.max_concurrent_requests}",
                reason="QUEUE_FULL",
                retry_after_s=self._config.retry_after_s,
            )
        if request.request_id in self._by_id:
            raise InvalidRequest(
                "a request with this id is under way", reason="DUPLICATE_REQUEST_ID", field="request_id"
            )
        task = asyncio.current_task()
        assert task is not None
        return ActiveRequest(request=replace(request, request_id=request.request_id or uuid.uuid4().hex), task=task)
