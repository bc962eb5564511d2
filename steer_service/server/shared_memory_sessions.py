"""Sessions of clients that have proven that they share the server's memory, by reading a nonce from a segment."""

import asyncio
import hmac
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, Unsupported
from steer_service.server.callers import Caller
from steer_service.server.instance import Instance
from steer_service.shm.segments import Segment, SegmentDirectory

NONCE_BYTES = 32

CHALLENGE_S = 30.0
"""Seconds that a client has to send the nonce back."""

MAX_CHALLENGES = 64
"""Challenges that one client may have open."""

MAX_ALL_CHALLENGES = 1024
"""Challenges that all clients together may have open, for a caller can use a new client id in each call."""

RETRY_AFTER_S = 1.0
"""Seconds after which a refused client may retry."""


@dataclass(slots=True, kw_only=True, eq=False)
class Challenge:
    """A nonce that a client must read from a segment and send back."""

    token: bytes
    """Identifies the challenge."""
    owner: str
    """The client that it was given to; "" without an id."""
    share: str
    """Whose share of the open challenges it takes."""
    nonce: bytes
    """The bytes to send back."""
    segment: Segment
    """The segment that holds the nonce."""
    expires_at: float
    """When it expires, in seconds since 1970."""
    timer: asyncio.TimerHandle
    """Removes the challenge when it expires."""


class SharedMemorySessions:
    """Open challenges and running sessions; with `directory` None this server hands out no shared memory.

    Belongs to one event loop. A challenge expires after `challenge_s` seconds.
    """

    def __init__(
        self,
        directory: SegmentDirectory | None,
        challenge_s: float = CHALLENGE_S,
        instance: Instance | None = None,
    ) -> None:
        self._directory = directory
        self._instance = instance or Instance()
        self._challenge_s = challenge_s
        self._challenges: dict[bytes, Challenge] = {}
        self._owner_of_session: dict[bytes, str] = {}
        self.closing = asyncio.Event()
        """Set when all sessions must end."""

    def __len__(self) -> int:
        """Running sessions."""
        return len(self._owner_of_session)

    @property
    def is_on(self) -> bool:
        """False if this server hands out no shared memory."""
        return self._directory is not None

    def challenge(self, caller: Caller) -> Challenge:
        """A new challenge for the caller.

        Raises Unsupported (SWITCHED_OFF) if this server hands out no shared memory, and EngineFailed (DRAINING) if it
        is stopping. Raises Overloaded if too many challenges are open, or if the system has no room for the segment.
        """
        if self._directory is None:
            raise Unsupported("this server hands out no shared memory", reason="SWITCHED_OFF")
        if self.closing.is_set():
            raise EngineFailed("the server is stopping", reason="DRAINING", retry_after_s=RETRY_AFTER_S)
        self._check_room(caller.share)
        token, nonce = self._instance.new_token(), secrets.token_bytes(NONCE_BYTES)
        segment = self._directory.create(NONCE_BYTES)
        segment.memory[:] = nonce
        self._challenges[token] = Challenge(
            token=token,
            owner=caller.owner,
            share=caller.share,
            nonce=nonce,
            segment=segment,
            expires_at=time.time() + self._challenge_s,
            timer=asyncio.get_running_loop().call_later(self._challenge_s, self._drop, token),
        )
        return self._challenges[token]

    @contextmanager
    def confirmed(self, token: bytes, nonce: bytes, owner: str) -> Iterator[bytes]:
        """A session token, which is valid for the duration of the block.

        Raises OtherInstance for a challenge of another server. Raises InvalidRequest for a wrong nonce, and for a
        challenge that is unknown, used, expired or another client's. A challenge can be used once, also with
        a wrong nonce.
        """
        self._use_challenge(token, nonce, owner)  # a frame of its own, so that the session keeps no segment open
        session = self._instance.new_token()
        self._owner_of_session[session] = owner
        try:
            yield session
        finally:
            del self._owner_of_session[session]

    def _use_challenge(self, token: bytes, nonce: bytes, owner: str) -> None:
        self._instance.check_own(token, "challenge_token")
        challenge = self._challenges.get(token)
        if challenge is None or challenge.owner != owner:
            raise InvalidRequest(
                "the challenge is unknown, was used or has expired", reason="UNKNOWN_CHALLENGE", field="challenge_token"
            )
        self._drop(token)
        if not hmac.compare_digest(challenge.nonce, nonce):
            raise InvalidRequest("this is not the nonce in the segment", reason="WRONG_NONCE", field="nonce")

    def holds(self, session: bytes, owner: str) -> bool:
        """True if this is a session of this client that has not ended."""
        return session in self._owner_of_session and self._owner_of_session[session] == owner

    def close(self) -> None:
        """Removes all challenges and makes all sessions end."""
        self.closing.set()
        for token in list(self._challenges):
            self._drop(token)

    def _check_room(self, share: str) -> None:
        mine = sum(challenge.share == share for challenge in self._challenges.values())
        for count, limit in ((mine, MAX_CHALLENGES), (len(self._challenges), MAX_ALL_CHALLENGES)):
            if count >= limit:
                raise Overloaded(
                    f"{count} challenges are open, at most {limit}",
                    reason="TOO_MANY_CHALLENGES",
                    retry_after_s=RETRY_AFTER_S,
                )

    def _drop(self, token: bytes) -> None:
        challenge = self._challenges.pop(token)
        challenge.timer.cancel()
        challenge.segment.unlink()
