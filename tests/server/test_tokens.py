"""The file of bearer tokens: what it may say, and what happens when it changes."""

import hashlib
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.server.client_limits import ClientLimits
from steer_service.server.config import ServerConfig
from steer_service.server.tokens import Quota, TokenFile


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def entry(name: str, *tokens: str, **more: object) -> str:
    lines = [f"[clients.{name}]", f"sha256 = {[digest(token) for token in tokens]}"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in more.items()), ""])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def test_a_token_names_its_client(path: Path) -> None:
    path.write_text(entry("alice", "a1", "a2") + entry('"bob.example"', "b", max_requests=3, max_fetches=2))
    tokens = TokenFile(str(path))

    names = {
        token: client and client.name for token in ("a1", "a2", "b") if (client := tokens.client_of(token.encode()))
    }
    assert names == {"a1": "alice", "a2": "alice", "b": "bob.example"}
    assert [tokens.client_of(token.encode()) for token in ("", "a", "a1 ", digest("a1"))] == [None] * 4
    assert tokens.quota_of("bob.example") == Quota(max_requests=3, max_fetches=2)


def test_a_token_that_has_expired_is_none(path: Path) -> None:
    now = datetime.now(UTC)
    path.write_text(
        entry("alice", "a", expires=(now - timedelta(seconds=1)).isoformat())
        + entry("bob", "b", expires=(now + timedelta(days=1)).isoformat())
    )
    tokens = TokenFile(str(path))
    assert tokens.client_of(b"a") is None
    assert tokens.client_of(b"b") is not None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it names no client"),
        ("[clients]", "it names no client"),
        ("clients = 3", "it names no client"),
        ("x = 1\n" + entry("a", "t"), "'x' is not known"),
        ("[clients.a\n", "it is not TOML"),
        ("Zm9v-_bar\n", "it has the token of a client, and not the clients of a server"),
        ("[clients]\na = " + "[" * 20_000, "it is not TOML"),
        ("[clients]\na = " + "1" * 5_000, "it is not TOML"),
        ("[clients]\na = 3", "client a is not a table"),
        (entry('"a b"', "t"), "the name of client 'a b' is not 1..128 characters"),
        ("[clients.a]\nmax_requests = 1", "client a needs sha256"),
        ("[clients.a]\nsha256 = []", "client a needs sha256"),
        ('[clients.a]\nsha256 = "' + digest("t") + '"', "client a needs sha256"),
        ('[clients.a]\nsha256 = ["' + digest("t").upper() + '"]', "client a needs sha256"),
        (entry("a", "t", max_request=1), "client a has 'max_request', which is not known"),
        (entry("a", "t", max_requests=0), "client a: max_requests is not an integer in 1..2^31-1"),
        (entry("a", "t", max_sessions="true"), "client a: max_sessions is not an integer"),
        (entry("a", "t", expires="2027-01-01T00:00:00"), "client a: expires is not a date and time with a time zone"),
        (entry("a", "t") + entry("b", "t"), "two clients have the same token"),
        (entry("a", "t", "t"), "two clients have the same token"),
        ("#" * (4 << 20) + "\n", "it is larger than"),
    ],
)
def test_a_file_that_is_not_valid_is_refused(path: Path, text: str, problem: str) -> None:
    path.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        TokenFile(str(path))
    assert (refused.value.reason, refused.value.field) == ("BAD_TOKEN_FILE", "token_file")
    assert problem in refused.value.message
    assert digest("t") not in refused.value.message


def test_a_file_that_cannot_be_read_is_refused(path: Path) -> None:
    for data in (None, b"\xff"):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(InvalidRequest, match=r"it cannot be read: No such file|it is not UTF-8"):
            TokenFile(str(path))


def test_a_changed_file_is_read_again_and_one_that_is_not_valid_changes_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(entry("alice", "old", max_requests=1))
    tokens = TokenFile(str(path))
    limits = ClientLimits(ServerConfig(max_client_requests=7), tokens)
    assert (limits.requests("identity alice"), limits.requests("client alice")) == (1, 7)

    path.write_text(entry("alice", "new", max_requests=2))
    assert tokens.client_of(b"new") is None
    tokens.refresh()
    assert (tokens.client_of(b"old"), limits.requests("identity alice")) == (None, 2)
    caplog.clear()
    for bad in ("nonsense = [", None):
        path.write_text(bad) if bad else os.unlink(path)
        with caplog.at_level(logging.ERROR):
            tokens.refresh()
            tokens.refresh()
        assert tokens.client_of(b"new") is not None
        assert len(caplog.records) == 1
        caplog.clear()
    path.write_text(entry("bob", "b"))
    tokens.refresh()
    assert tokens.client_of(b"new") is None
    assert limits.requests("identity alice") == 7


@pytest.mark.parametrize("broken", ["[" * 20_000, "[clients]\na = " + "1" * 5_000, "\x00", "[clients.a]\nsha256 = 3"])
def test_a_file_that_cannot_be_read_again_does_not_stop_the_next_from_being_read(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("alice", "old"))
    tokens = TokenFile(str(path))
    path.write_text(broken)
    tokens.refresh()
    assert tokens.client_of(b"old") is not None
    path.write_text(entry("alice", "another"))
    tokens.refresh()
    assert tokens.client_of(b"old") is None
    assert tokens.client_of(b"another") is not None


def test_an_unexpected_error_while_reading_again_is_logged_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("alice", "old"))
    tokens = TokenFile(str(path))
    monkeypatch.setattr("tomllib.loads", lambda _: {}["slip"])
    path.write_text(entry("alice", "another"))
    tokens.refresh()
    assert tokens.client_of(b"old") is not None
    assert "cannot be read, the old ones stay in use: KeyError" in caplog.text
