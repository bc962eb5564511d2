"""Finds the request that kills the engine, among those that were in flight when it died.

Clients send requests again that were lost with the engine. A request that was in flight at two deaths is a suspect, and
all its neighbours may be, too. Only one suspect at a time runs in the engine. A suspect that completes is cleared. One
that runs when the engine dies for the third time is quarantined: it never reaches the engine again.

Requests are recognised by their client and their content. Until the engine dies for the first time this costs nothing.
"""

import asyncio
import collections
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from hashlib import sha256

from steer_service.core.errors import Unsupported
from steer_service.core.request import GenerateRequest

SUSPECT_DEATHS = 2
"""Deaths of the engine after which a request that was in flight at each runs alone among the suspects."""

MAX_REMEMBERED = 10_000
"""Requests that are remembered at most; the oldest are forgotten."""


class Quarantine:
    """Counts the deaths of the engine at which each request was in flight; belongs to one event loop."""

    def __init__(self) -> None:
        self._deaths: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._turn = asyncio.Lock()

    def note_death(self, requests: Iterable[GenerateRequest]) -> None:
        """The engine died while it ran these requests."""
        for key in {_key_of(request) for request in requests}:
            self._deaths[key] = self._deaths.pop(key, 0) + 1
        while len(self._deaths) > MAX_REMEMBERED:
            self._deaths.popitem(last=False)

    @asynccontextmanager
    async def turn(self, request: GenerateRequest) -> AsyncIterator[None]:
        """Goes around the run of a request in the engine; a suspect waits until no other one runs.

        Raises Unsupported (QUARANTINED) for a request that killed the engine.
        """
        if not self._deaths:
            yield
            return
        key = _key_of(request)
        if self._deaths.get(key, 0) >= SUSPECT_DEATHS:
            async with self._turn:
                self._check(key)
                yield
        else:
            yield
        self._deaths.pop(key, None)  # it has completed

    def _check(self, key: bytes) -> None:
        if self._deaths.get(key, 0) > SUSPECT_DEATHS:
            raise Unsupported(
                "the engine died each time that it ran this request; it is not run again", reason="QUARANTINED"
            )


def _key_of(request: GenerateRequest) -> bytes:
    steering = request.steering.digest() if request.steering is not None else ""
    prompt = (request.prompt, request.truncate_prompt_tokens)
    content = (request.client_id, request.model, prompt, request.sampling, request.capture, steering)
    return sha256(repr(content).encode()).digest()
