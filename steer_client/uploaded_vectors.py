"""Which vectors a client need not send again, and how it resends those that the server has lost."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from steer_service.core.errors import MissingVectors
from steer_service.core.events import Event, Started
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import SteeringSpec
from steer_service.wire import generation_pb2
from steer_service.wire.request import request_to_proto
from steer_service.wire.steering import named_vectors

Send = Callable[[generation_pb2.GenerateRequest], AsyncGenerator[Event, None]]
"""Sends a message; the events of its response."""

MIN_NAMED_BYTES = 256
"""Smaller vectors are always sent: a name takes 34 bytes."""

MAX_NAMES = 1 << 16
"""Most names to remember, 32 bytes each: more vectors than a server stores for one client by default."""


class UploadedVectors:
    """Digests of the vectors that the server stores for this client; may be used from several threads."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    async def send(self, request: GenerateRequest, send: Send) -> AsyncGenerator[Event, None]:
        """Sends `request`, with the vectors that the server stores named; yields the events of its response.

        If the server has lost one of them, sends the request again with all its vectors.
        """
        has_events = False
        for named in (self, ()):
            message = request_to_proto(request, named)
            try:
                async with aclosing(send(message)) as events:
                    async for event in events:
                        has_events = True
                        if isinstance(event, Started) and event.vectors_stored and request.steering is not None:
                            self.add(request.steering)
                        yield event
                return
            except MissingVectors as error:
                if has_events or not named_vectors(message.steering):
                    raise
                self.forget(error)

    def add(self, spec: SteeringSpec) -> None:
        """Records that the server stores the vectors of `spec`; small ones, which are always sent, are left out."""
        if len(self._names) > MAX_NAMES:
            self._names.clear()
        pairs = zip(spec.vector_digests(), spec.vectors(), strict=True)
        self._names.update(digest for digest, vector in pairs if vector.nbytes >= MIN_NAMED_BYTES)

    def forget(self, error: MissingVectors) -> None:
        """Removes the vectors that the server no longer stores."""
        if error.count > len(error.digests):
            self._names.clear()
        else:
            self._names.difference_update(error.digests)
