"""Which clients have proven that they share the server's memory: a nonce in a segment, read and sent back."""

import asyncio
import hmac
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, Unsupported
from steer_service.shm.segments import Segment, SegmentDirectory

NONCE_BYTES = 32
CHALLENGE_S = 30.0
"""How long a client has to read the nonce, in seconds."""
MAX_CHALLENGES = 64
"""Challenges that one client may have open."""
MAX_ALL_CHALLENGES = 1024
"""Challenges that may be open at all: whoever says a new name with each call is a new client with each call."""
RETRY_AFTER_S = 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class Challenge:
    """A nonce that waits to be read."""

    token: bytes
    """Names it."""
    client_id: str
    """The client that asked for it."""
    nonce: bytes
    """What the client must send back."""
    segment: Segment
    """Where it can be read."""
    expires_at: float
    """When it ends, in seconds since 1970."""
    timer: asyncio.TimerHandle
    """Ends it."""


class SharedMemorySessions:
    """Challenges and the sessions that came of them; `directory` None: this server hands out no shared memory.

    Belongs to one event loop. A challenge that is not answered ends after `challenge_s`.
    """

    def __init__(self, directory: SegmentDirectory | None, challenge_s: float = CHALLENGE_S) -> None:
        self._directory = directory
        self._challenge_s = challenge_s
        self._challenges: dict[bytes, Challenge] = {}
        self._owners: dict[bytes, str] = {}
        self.closing = asyncio.Event()
        """Set when all sessions are to end."""

    @property
    def is_on(self) -> bool:
        """False if this server hands out no shared memory."""
        return self._directory is not None

    def challenge(self, client_id: str) -> Challenge:
        """A new challenge.

        Raises Unsupported where there is no shared memory, Overloaded for too many at once or if the system has no
        room for its segment, EngineFailed once the sessions are to end.
        """
        if self._directory is None:
            raise Unsupported("this server hands out no shared memory", reason="SWITCHED_OFF")
        if self.closing.is_set():
            raise EngineFailed("the server is stopping", reason="DRAINING", retry_after_s=RETRY_AFTER_S)
        self._check_room(client_id)
        token, nonce = secrets.token_bytes(32), secrets.token_bytes(NONCE_BYTES)
        segment = self._directory.create(NONCE_BYTES)
        segment.memory[:] = nonce
        self._challenges[token] = Challenge(
            token=token,
            client_id=client_id,
            nonce=nonce,
            segment=segment,
            expires_at=time.time() + self._challenge_s,
            timer=asyncio.get_running_loop().call_later(self._challenge_s, self._drop, token),
        )
        return self._challenges[token]

    @contextmanager
    def confirmed(self, token: bytes, nonce: bytes, client_id: str) -> Iterator[bytes]:
        """A session token, which holds for the duration of the block.

        Raises InvalidRequest for a wrong nonce, and for a challenge that is unknown, was answered, has expired, or is
        another client's. A challenge is answered once, rightly or not.
        """
        self._answer(token, nonce, client_id)  # in a frame of its own: the segment is not kept open by its session
        session = secrets.token_bytes(32)
        self._owners[session] = client_id
        try:
            yield session
        finally:
            del self._owners[session]

    def _answer(self, token: bytes, nonce: bytes, client_id: str) -> None:
        challenge = self._challenges.get(token)
        if challenge is None or challenge.client_id != client_id:
            raise InvalidRequest(
                "the challenge is unknown, answered or too old", reason="UNKNOWN_CHALLENGE", field="challenge_token"
            )
        self._drop(token)
        if not hmac.compare_digest(challenge.nonce, nonce):
            raise InvalidRequest("it is not what the segment holds", reason="WRONG_NONCE", field="nonce")

    def holds(self, session: bytes, client_id: str) -> bool:
        """True if this is a session of this client that has not ended."""
        return session in self._owners and self._owners[session] == client_id

    def close(self) -> None:
        """Removes the challenges, and tells sessions to end."""
        self.closing.set()
        for token in list(self._challenges):
            self._drop(token)

    def _check_room(self, client_id: str) -> None:
        mine = sum(challenge.client_id == client_id for challenge in self._challenges.values())
        for count, limit in ((mine, MAX_CHALLENGES), (len(self._challenges), MAX_ALL_CHALLENGES)):
            if count >= limit:
                raise Overloaded(
                    f"{limit} challenges wait for an answer, and no more are given",
                    reason="TOO_MANY_CHALLENGES",
                    retry_after_s=RETRY_AFTER_S,
                )

    def _drop(self, token: bytes) -> None:
        challenge = self._challenges.pop(token)
        challenge.timer.cancel()
        challenge.segment.unlink()
