"""The table of running requests, and the reasons to refuse another."""

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
    """A running request."""

    request: GenerateRequest
    """The request; its id is never empty."""
    task: "asyncio.Task[object]"
    """The task of its gRPC handler."""
    cancel_token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    """The secret with which a client can cancel it."""
    events: AsyncGenerator[Event, None] | None = None
    """The backend's events; set by the handler before it sends anything."""
    is_sending: bool = False
    """True while gRPC sends a response and may wait for a slow reader; set by the handler."""
    stopped_by: SteerError | None = None
    """The error with which `stop` ended it; None if it was not stopped."""
    _closing: "asyncio.Task[None] | None" = field(default=None, init=False)

    def stop(self, error: SteerError) -> None:
        """Ends the request with `error`, which its client receives; a second call does nothing."""
        if self.stopped_by is not None:
            return
        self.stopped_by = error
        if self.is_sending:
            # Cancelling the task here would cancel gRPC's own write and leave the client without a status. The engine
            # is freed now. The handler reports `error` once the client reads again, or ends with the connection.
            self._begin_closing()
        else:
            self.task.cancel()

    def check_running(self) -> None:
        """Raises the error with which the request was stopped, if it was."""
        if self.stopped_by is not None:
            raise self.stopped_by

    async def aclose(self) -> None:
        """Frees what the request holds in the backend; completes even if the calling task is cancelled meanwhile."""
        await asyncio.shield(self._begin_closing())

    def _begin_closing(self) -> "asyncio.Task[None]":
        if self._closing is None:
            assert self.events is not None
            self._closing = asyncio.ensure_future(_close(self.events))
        return self._closing


async def _close(events: AsyncGenerator[Event, None]) -> None:
    await events.aclose()


class Admission:
    """Admits requests while a backend is open, there is room, and the server does not drain."""

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
        """The open backend; raises EngineFailed (LOADING, DRAINING) while there is none."""
        if self._is_draining:
            raise EngineFailed("the server is stopping", reason="DRAINING", retry_after_s=self._config.retry_after_s)
        if self._backend is None:
            raise EngineFailed("the model is loading", reason="LOADING", retry_after_s=self._config.retry_after_s)
        return self._backend

    @property
    def running(self) -> int:
        """The number of running requests."""
        return len(self._by_id)

    def open(self, backend: Backend) -> None:
        """Admits requests to `backend` from now on."""
        self._backend = backend

    def drain(self) -> None:
        """Admits nothing from now on."""
        self._is_draining = True

    @contextmanager
    def admit(self, request: GenerateRequest) -> Iterator[ActiveRequest]:
        """Keeps `request` in the table of running requests until the block ends.

        Raises EngineFailed, Overloaded or InvalidRequest if it is refused. If the block is cancelled because the
        request was stopped, the error given to `stop` replaces CancelledError.
        """
        active = self._active_request(request)
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
        """Stops the request that has this cancel token; False if none runs."""
        active = self._by_token.get(token)
        if active is None or active.stopped_by is not None:
            return False
        active.stop(EngineFailed("the request was cancelled by its token", reason="CANCELLED"))
        return True

    def release_nowait(self, release_token: bytes, client_id: str) -> None:
        """Stops the client's request that has this release token, if it is running."""
        for active in list(self._by_id.values()):
            capture = active.request.capture
            if capture is not None and (capture.release_token, active.request.client_id) == (release_token, client_id):
                active.stop(EngineFailed("the client released the captures of this request", reason="CANCELLED"))

    def stop_all(self, error: SteerError) -> None:
        """Stops every request with `error`."""
        for active in list(self._by_id.values()):
            active.stop(error)

    async def wait_idle(self) -> None:
        """Returns when no request is running."""
        await self._idle.wait()

    def _active_request(self, request: GenerateRequest) -> ActiveRequest:
        _ = self.backend  # raises while nothing serves
        if len(self._by_id) >= self._config.max_concurrent_requests:
            raise Overloaded(
                f"{len(self._by_id)} requests are running, at most {self._config.max_concurrent_requests}",
                reason="QUEUE_FULL",
                retry_after_s=self._config.retry_after_s,
            )
        if request.request_id in self._by_id:
            raise InvalidRequest("a request with this id is running", reason="DUPLICATE_REQUEST_ID", field="request_id")
        task = asyncio.current_task()
        assert task is not None
        return ActiveRequest(request=replace(request, request_id=request.request_id or uuid.uuid4().hex), task=task)
