"""Which vectors a client need not send again, and how it resends those that a server does not have."""

import threading
from collections.abc import AsyncGenerator, Callable, Container, Iterable
from contextlib import aclosing

from steer_service.core.errors import MissingVectors
from steer_service.core.events import Event, Started
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import SteeringSpec
from steer_service.wire import generation_pb2
from steer_service.wire.request import request_to_proto
from steer_service.wire.steering import named_vectors

Send = Callable[[generation_pb2.GenerateRequest, str], AsyncGenerator[Event, None]]
"""Sends a message to the server of that name, if there are several; the events of its response."""

MIN_NAMED_BYTES = 256
"""Smaller vectors are always sent: a name takes 34 bytes."""

MAX_NAMES = 1 << 16
"""Most names to remember of a server, 32 bytes each: more vectors than it stores for one client by default."""

FORGOTTEN_AFTER = 64
"""A server that answered none of so many requests in a row is no longer expected behind the balancer."""


class UploadedVectors:
    """Digests of the vectors that each server stores for this client; may be used from several threads.

    A request asks for the server that answered last. A balancer may send it to another one, which then lacks vectors
    and makes the request twice as long. A request therefore names only what all servers store that have answered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, set[bytes]] = {}
        self._seen: dict[str, int] = {}  # server -> count of requests when it last answered
        self._requests = 0
        self._last = ""

    async def send(self, request: GenerateRequest, send: Send) -> AsyncGenerator[Event, None]:
        """Sends `request`, with the vectors that its server stores named; yields the events of its response.

        If the server lacks one of them, sends the request again with all its vectors.
        """
        has_events = False
        last, stored = self.expected() if request.steering is not None else ("", _OnAll(()))
        for named in (stored, _OnAll(())):
            message = request_to_proto(request, named)
            is_named = bool(named_vectors(message.steering))
            try:
                async with aclosing(send(message, last if is_named else "")) as events:
                    async for event in events:
                        has_events = True
                        if isinstance(event, Started) and request.steering is not None:
                            self._note_answer(event.instance)
                            if event.vectors_stored:
                                self.add(request.steering, event.instance)
                        yield event
                return
            except MissingVectors as error:
                if has_events or not is_named:
                    raise
                self._note_answer(error.instance)
                self.forget(error)

    def add(self, spec: SteeringSpec, instance: str = "") -> None:
        """Records that a server stores the vectors of `spec`; small ones, which are always sent, are left out."""
        pairs = zip(spec.vector_digests(), spec.vectors(), strict=True)
        digests = [digest for digest, vector in pairs if vector.nbytes >= MIN_NAMED_BYTES]
        with self._lock:
            names = self._names.setdefault(instance, set())
            if len(names) > MAX_NAMES:
                names.clear()
            names.update(digests)
            self._seen.setdefault(instance, self._requests)

    def forget(self, error: MissingVectors) -> None:
        """Records which vectors a server does not store."""
        with self._lock:
            names = self._names.setdefault(error.instance, set())
            if error.count > len(error.digests):
                names.clear()
            else:
                names.difference_update(error.digests)

    def expected(self) -> tuple[str, Container[bytes]]:
        """The server that answered last, and the vectors that are on all servers."""
        with self._lock:
            self._requests += 1
            for gone in [one for one, last in self._seen.items() if self._requests - last > FORGOTTEN_AFTER]:
                del self._seen[gone]
                self._names.pop(gone, None)
            return self._last, _OnAll(self._names.setdefault(one, set()) for one in self._seen)

    def _note_answer(self, instance: str) -> None:
        with self._lock:
            self._seen[instance] = self._requests
            self._last = instance


class _OnAll:
    """The vectors that are in each of several sets; none, if there is no set."""

    def __init__(self, sets: Iterable[Container[bytes]]) -> None:
        self._sets = tuple(sets)

    def __contains__(self, digest: object) -> bool:
        return bool(self._sets) and all(digest in one for one in self._sets)
