"""Bearer tokens of clients: a TOML file with a name, limits, and the SHA-256 of the tokens of each client.

    [clients.alice]
    sha256 = ["6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"]
    expires = 2027-01-01T00:00:00Z
    max_requests = 8

`steer token alice` makes a token and prints such an entry. A client has several tokens while one is being replaced.
"""

import hashlib
import hmac
import re
import tomllib
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import IDENTIFIER
from steer_service.server.reloaded import Reloaded

FIELD = "token_file"
MOST_BYTES = 1 << 20
"""Bytes of a token file at most."""

SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one client may have at once, in place of the server's own limits; None: the server's."""

    max_requests: int | None = None
    """Requests that run or wait."""
    max_fetches: int | None = None
    """Captures that it fetches."""
    max_sessions: int | None = None
    """Shared-memory sessions."""


QUOTAS = tuple(field.name for field in fields(Quota))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClient:
    """A client of the file."""

    name: str
    """Owns the captures and vectors of its calls; 1..128 characters of `A-Z a-z 0-9 . _ : -`."""
    hashes: tuple[bytes, ...]
    """SHA-256 of each of its tokens."""
    expires: datetime | None
    """When its tokens cease to be valid; None: never."""
    quota: Quota


class TokenFile:
    """The clients of one file, read again when it changes."""

    def __init__(self, path: str) -> None:
        """Raises InvalidRequest (BAD_TOKEN_FILE) for a file that cannot be read or is not valid."""
        self._clients = Reloaded("tokens", [path], lambda: {client.name: client for client in read_clients(path)})

    def client_of(self, token: bytes) -> TokenClient | None:
        """The client with this token, if it has not expired. Takes as long for one token as for any other."""
        digest = hashlib.sha256(token).digest()
        found = None
        for client in self._clients.value.values():
            for known in client.hashes:
                if hmac.compare_digest(known, digest):
                    found = client
        if found is None or (found.expires is not None and found.expires <= datetime.now(UTC)):
            return None
        return found

    def quota_of(self, name: str) -> Quota:
        """The quota of a client; the server's, if it is no longer in the file."""
        client = self._clients.value.get(name)
        return client.quota if client is not None else Quota()

    def refresh(self) -> None:
        """Reads the file again if it has changed. One that is not valid is logged, and the clients stay as they are."""
        self._clients.refresh()


def read_clients(path: str) -> tuple[TokenClient, ...]:
    """The clients of a file; raises InvalidRequest (BAD_TOKEN_FILE)."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise _bad(f"it is larger than {MOST_BYTES} bytes")
        document = tomllib.loads(data.decode())
    except OSError as error:
        raise _bad(f"it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _bad("it is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise _bad(f"it is not TOML: {error}") from error
    clients = document.pop("clients", {})
    if document:
        raise _bad(f"{next(iter(document))!r} is not known; there is only [clients.NAME]")
    if not isinstance(clients, dict) or not clients:
        raise _bad("it names no client: write [clients.NAME]")
    read = tuple(_client(name, entry) for name, entry in clients.items())
    hashes = [one for client in read for one in client.hashes]
    if len(set(hashes)) < len(hashes):
        raise _bad("two clients have the same token, or one has it twice")
    return read


def _client(name: str, entry: Any) -> TokenClient:
    if not IDENTIFIER.fullmatch(name):
        raise _bad(f"the name of client {name!r} is not 1..128 characters of A-Z a-z 0-9 . _ : -")
    if not isinstance(entry, dict):
        raise _bad(f"client {name} is not a table")
    unknown = set(entry) - {"sha256", "expires", *QUOTAS}
    if unknown:
        raise _bad(f"client {name} has {sorted(unknown)[0]!r}, which is not known")
    hashes = entry.get("sha256")
    if not isinstance(hashes, list) or not hashes or not all(_is_hash(one) for one in hashes):
        raise _bad(f"client {name} needs sha256 = [...]: the SHA-256 of each of its tokens, 64 digits of 0-9 a-f")
    expires = entry.get("expires")
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo is not None):
        raise _bad(f"client {name}: expires is not a date and time with a time zone, such as 2027-01-01T00:00:00Z")
    quota = {key: entry[key] for key in QUOTAS if key in entry}
    for key, value in quota.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise _bad(f"client {name}: {key} is not an integer in 1..2^31-1")
    return TokenClient(
        name=name, hashes=tuple(bytes.fromhex(one) for one in hashes), expires=expires, quota=Quota(**quota)
    )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="BAD_TOKEN_FILE", field=FIELD)
