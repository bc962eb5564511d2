"""The proof that memory is shared: a nonce that only its client can answer, once, in time."""

import asyncio
import os
from pathlib import Path

import pytest

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, Unsupported
from steer_service.server import shared_memory_sessions as module
from steer_service.server.callers import Caller
from steer_service.server.shared_memory_sessions import Challenge, SharedMemorySessions
from steer_service.shm.segments import SegmentDirectory
from tests.server.served import bounded
from tests.shm.folders import no_more_files, segments_in


def caller(name: str) -> Caller:
    return Caller(owner=name, share=name, connection="")


@pytest.fixture
async def sessions(tmp_path: Path) -> SharedMemorySessions:
    return SharedMemorySessions(SegmentDirectory(path=tmp_path))


def answer(sessions: SharedMemorySessions, challenge: Challenge, **changed: object) -> bytes:
    """A session that has ended by the time its token is returned."""
    given = {"token": challenge.token, "nonce": challenge.nonce, "owner": challenge.owner, **changed}
    with sessions.confirmed(**given) as session:  # type: ignore[arg-type]
        return session


async def gone(folder: Path) -> None:
    while segments_in(folder):
        await asyncio.sleep(0.001)


async def test_reading_the_nonce_opens_a_session(sessions: SharedMemorySessions, tmp_path: Path) -> None:
    challenge = sessions.challenge(caller("a"))
    nonce = (tmp_path / challenge.segment.name).read_bytes()

    with sessions.confirmed(challenge.token, nonce, "a") as session:
        assert sessions.holds(session, "a")
        assert not sessions.holds(session, "b")
        assert not sessions.holds(b"", "a")
        assert segments_in(tmp_path) == []

    assert not sessions.holds(session, "a")


async def test_a_session_ends_with_an_error_too(sessions: SharedMemorySessions) -> None:
    challenge = sessions.challenge(caller("a"))

    with pytest.raises(KeyError), sessions.confirmed(challenge.token, challenge.nonce, "a") as session:
        raise KeyError

    assert not sessions.holds(session, "a")


async def test_secrets_are_long_and_differ(sessions: SharedMemorySessions) -> None:
    challenges = [sessions.challenge(caller("a")) for _ in range(10)]
    tokens = [answer(sessions, challenge) for challenge in challenges]

    for secrets in (tokens, *([getattr(one, name) for one in challenges] for name in ("token", "nonce"))):
        assert len(set(secrets)) == 10
        assert all(len(secret) >= 32 for secret in secrets)
    assert {one.segment.name for one in challenges}.isdisjoint(one.token.hex() for one in challenges)


@pytest.mark.parametrize("nonce", [b"", b"x" * 31, b"x" * 32, b"x" * 64])
async def test_a_wrong_nonce_is_refused_and_cannot_be_mended(
    nonce: bytes, sessions: SharedMemorySessions, tmp_path: Path
) -> None:
    challenge = sessions.challenge(caller("a"))

    with pytest.raises(InvalidRequest) as raised:
        answer(sessions, challenge, nonce=nonce)

    assert (raised.value.reason, raised.value.field) == ("WRONG_NONCE", "nonce")
    assert segments_in(tmp_path) == []
    with pytest.raises(InvalidRequest) as raised:
        answer(sessions, challenge)
    assert raised.value.reason == "UNKNOWN_CHALLENGE"


async def test_a_challenge_is_answered_once(sessions: SharedMemorySessions) -> None:
    challenge = sessions.challenge(caller("a"))
    answer(sessions, challenge)

    with pytest.raises(InvalidRequest) as raised:
        answer(sessions, challenge)

    assert (raised.value.reason, raised.value.field) == ("UNKNOWN_CHALLENGE", "challenge_token")


async def test_another_clients_challenge_is_unknown_and_stays_with_its_owner(
    sessions: SharedMemorySessions,
) -> None:
    challenge = sessions.challenge(caller("a"))
    errors = []
    for changed in ({"owner": "b"}, {"owner": ""}, {"token": b"never"}, {"token": b""}):
        with pytest.raises(InvalidRequest) as raised:
            answer(sessions, challenge, **changed)
        errors.append(raised.value)

    assert len({(error.reason, error.field, error.message) for error in errors}) == 1
    assert len(answer(sessions, challenge)) >= 32


async def test_an_unanswered_challenge_expires_with_its_segment(tmp_path: Path) -> None:
    sessions = SharedMemorySessions(SegmentDirectory(path=tmp_path), challenge_s=0.02)
    challenge = sessions.challenge(caller("a"))
    assert len(segments_in(tmp_path)) == 1

    await bounded(gone(tmp_path))

    with pytest.raises(InvalidRequest) as raised:
        answer(sessions, challenge)
    assert raised.value.reason == "UNKNOWN_CHALLENGE"


async def test_too_many_challenges_are_refused_per_client(sessions: SharedMemorySessions, tmp_path: Path) -> None:
    challenges = [sessions.challenge(caller("a")) for _ in range(module.MAX_CHALLENGES)]

    with pytest.raises(Overloaded) as raised:
        sessions.challenge(caller("a"))

    assert raised.value.reason == "TOO_MANY_CHALLENGES"
    assert raised.value.retry_after_s is not None
    assert len(segments_in(tmp_path)) == module.MAX_CHALLENGES
    sessions.challenge(caller("b"))
    answer(sessions, challenges[0])
    sessions.challenge(caller("a"))


async def test_a_client_of_many_names_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ALL_CHALLENGES", 5)
    sessions = SharedMemorySessions(SegmentDirectory(path=tmp_path))
    for number in range(5):
        sessions.challenge(caller(f"name {number}"))

    with pytest.raises(Overloaded) as raised:
        sessions.challenge(caller("another"))

    assert raised.value.reason == "TOO_MANY_CHALLENGES"
    assert len(segments_in(tmp_path)) == 5


async def test_without_room_for_its_segment_a_challenge_is_refused_for_now(
    sessions: SharedMemorySessions, tmp_path: Path
) -> None:
    with no_more_files(), pytest.raises(Overloaded) as raised:
        sessions.challenge(caller("a"))

    assert raised.value.reason == "SHM_SPACE"
    assert raised.value.retry_after_s is not None
    assert segments_in(tmp_path) == []
    assert len(answer(sessions, sessions.challenge(caller("a")))) >= 32


async def test_a_segment_that_its_reader_removed_is_no_error(sessions: SharedMemorySessions, tmp_path: Path) -> None:
    challenge = sessions.challenge(caller("a"))
    os.unlink(tmp_path / challenge.segment.name)

    assert len(answer(sessions, challenge)) >= 32


async def test_a_segment_that_its_reader_shortened_is_no_error(sessions: SharedMemorySessions, tmp_path: Path) -> None:
    challenge = sessions.challenge(caller("a"))
    os.truncate(tmp_path / challenge.segment.name, 0)

    assert len(answer(sessions, challenge)) >= 32


async def test_closing_removes_challenges_ends_sessions_and_refuses_new_ones(
    sessions: SharedMemorySessions, tmp_path: Path
) -> None:
    challenge = sessions.challenge(caller("a"))
    assert not sessions.closing.is_set()

    sessions.close()
    sessions.close()

    assert sessions.closing.is_set()
    assert segments_in(tmp_path) == []
    with pytest.raises(InvalidRequest):
        answer(sessions, challenge)
    with pytest.raises(EngineFailed) as raised:
        sessions.challenge(caller("a"))
    assert raised.value.reason == "DRAINING"


async def test_without_shared_memory_there_are_no_challenges() -> None:
    sessions = SharedMemorySessions(None)

    assert not sessions.is_on
    with pytest.raises(Unsupported) as raised:
        sessions.challenge(caller("a"))
    assert raised.value.reason == "SWITCHED_OFF"
