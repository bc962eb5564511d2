"""The clients of a server: a TOML file with a name, limits, and the SHA-256 of the tokens of each client.

    [clients.alice]
    sha256 = ["6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"]
    expires = 2027-01-01T00:00:00Z
    max_requests = 8

    [clients."spiffe://example.org/ns/research/sa/notebook"]
    certificate = true
    allow = ["steering"]

The second client needs no token, since its certificate has its name. `steer token alice` makes a token and prints an
entry as the first. A client has several tokens while one is being replaced.
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
from steer_service.core.small_file import read_small
from steer_service.server.reloaded import Reloaded
from steer_service.server.trusted_proxy import NAME

FIELD = "token_file"

SHA256 = re.compile("[0-9a-f]{64}")
_BARE_TOKEN = re.compile(rb"\s*[A-Za-z0-9._~+/-]+=*\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one client may have at once, in place of the server's own limits; None: the server's."""

    max_requests: int | None = None
    """Requests that run or wait."""
    max_fetches: int | None = None
    """Captures that it fetches."""
    max_sessions: int | None = None
    """Shared-memory sessions."""
    max_capture_bytes: int | None = None
    """Bytes of capture memory, of running requests and of captures that are kept."""
    max_vector_bytes: int | None = None
    """Bytes of stored vectors."""


QUOTAS = tuple(field.name for field in fields(Quota))

PERMISSIONS = ("steering", "capture")
"""What `allow` may list: the parts of a request that a client may use besides generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClient:
    """A client of the file."""

    name: str
    """Owns the captures and vectors of its calls; 1..128 characters of `A-Z a-z 0-9 . _ : -`, or a certificate's."""
    hashes: tuple[bytes, ...]
    """SHA-256 of each of its tokens."""
    has_certificate: bool
    """True: a certificate with this name is enough."""
    expires: datetime | None
    """When its tokens cease to be valid; None: never."""
    quota: Quota
    allow: frozenset[str] = frozenset(PERMISSIONS)
    """Which of PERMISSIONS it has."""


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
        return None if found is None or _is_over(found) else found

    def has_certificate(self, name: str) -> bool:
        """True if a client with this name in its certificate needs no token, and has not expired."""
        client = self._clients.value.get(name)
        return client is not None and client.has_certificate and not _is_over(client)

    def may(self, name: str, permission: str) -> bool:
        """True if a client has one of PERMISSIONS; a client that is no longer in the file has none."""
        client = self._clients.value.get(name)
        return client is not None and permission in client.allow

    def quota_of(self, name: str) -> Quota:
        """The quota of a client; the server's, if it is no longer in the file."""
        client = self._clients.value.get(name)
        return client.quota if client is not None else Quota()

    def refresh(self) -> None:
        """Reads the file again if it has changed. One that is not valid is logged, and the clients stay as they are."""
        self._clients.refresh()


def _is_over(client: TokenClient) -> bool:
    return client.expires is not None and client.expires <= datetime.now(UTC)


def read_clients(path: str) -> tuple[TokenClient, ...]:
    """The clients of a file; raises InvalidRequest (BAD_TOKEN_FILE)."""
    try:
        data = read_small(path)
        document = tomllib.loads(data.decode())
    except OSError as error:
        raise _bad(f"it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _bad("it is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        if _BARE_TOKEN.fullmatch(data):
            raise _bad("it has the token of a client, and not the clients of a server") from error
        raise _bad(f"it is not TOML: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise _bad("it is not TOML that can be read") from error
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
    has_certificate = isinstance(entry, dict) and entry.get("certificate") is True
    if not (NAME if has_certificate else IDENTIFIER).fullmatch(name):
        raise _bad(f"the name of client {name!r} is not 1..128 characters of A-Z a-z 0-9 . _ : -")
    if not isinstance(entry, dict):
        raise _bad(f"client {name} is not a table")
    unknown = set(entry) - {"sha256", "certificate", "allow", "expires", *QUOTAS}
    if unknown:
        raise _bad(f"client {name} has {sorted(unknown)[0]!r}, which is not known")
    if not isinstance(entry.get("certificate", False), bool):
        raise _bad(f"client {name}: certificate is neither true nor false")
    hashes = entry.get("sha256", [] if has_certificate else None)
    if not isinstance(hashes, list) or not (hashes or has_certificate) or not all(_is_hash(one) for one in hashes):
        raise _bad(
            f"client {name} needs sha256 = [...]: the SHA-256 of each of its tokens, 64 digits of 0-9 a-f; "
            "or certificate = true, if its certificate has this name"
        )
    allow = entry.get("allow", list(PERMISSIONS))
    if not isinstance(allow, list) or not set(map(str, allow)) <= set(PERMISSIONS):
        raise _bad(f"client {name}: allow is not a list of {' and '.join(map(repr, PERMISSIONS))}")
    expires = entry.get("expires")
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo is not None):
        raise _bad(f"client {name}: expires is not a date and time with a time zone, such as 2027-01-01T00:00:00Z")
    quota = {key: entry[key] for key in QUOTAS if key in entry}
    for key, value in quota.items():
        bits = 63 if key.endswith("_bytes") else 31
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**bits:
            raise _bad(f"client {name}: {key} is not an integer in 1..2^{bits}-1")
    return TokenClient(
        name=name,
        hashes=tuple(bytes.fromhex(one) for one in hashes),
        has_certificate=has_certificate,
        expires=expires,
        quota=Quota(**quota),
        allow=frozenset(map(str, allow)),
    )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="BAD_TOKEN_FILE", field=FIELD)
