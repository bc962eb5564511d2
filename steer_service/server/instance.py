"""The server's name among those behind a balancer: in its ids and tokens, and in the headers of its responses.

Captures, leases, sessions and running requests exist on one server only. Each id and token therefore begins with the
name of its server, so that another one can say where it belongs.
"""

import base64
import binascii
import re
import secrets

import grpc

from steer_service.core.errors import InvalidRequest, OtherInstance

KEY = "steer-instance"
"""Metadata key of the name, in base64: the form in which Envoy's stateful sessions have the address of a host."""

NAME = re.compile(r"[A-Za-z0-9._:\[\]-]{1,128}")
"""Names, such as `10.0.0.3:50051`, `[fd00::3]:50051` and `steerllm-0`."""

SEPARATOR = "/"
"""Between the name and the secret of an id; no name has it."""

SECRET_BYTES = 32


def check_name(name: str) -> None:
    """Raises InvalidRequest unless `name` can be an instance's name."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not 1..128 characters of A-Z a-z 0-9 . _ : [ ] -, such as 10.0.0.3:50051", field="instance"
        )


class Instance:
    """One server's name."""

    def __init__(self, name: str = "") -> None:
        """`name`: a random one by default."""
        self.name = name or secrets.token_hex(8)
        """The name."""
        self.run_id = secrets.token_hex(8)
        """Differs between servers, and between two starts of one."""
        self.header = (KEY, base64.b64encode(self.name.encode()).decode())
        """The metadata of responses."""

    def new_id(self) -> str:
        """A new id that cannot be guessed."""
        return f"{self.name}{SEPARATOR}{secrets.token_urlsafe(SECRET_BYTES)}"

    def new_token(self) -> bytes:
        """A new token that cannot be guessed."""
        return f"{self.name}{SEPARATOR}".encode() + secrets.token_bytes(SECRET_BYTES)

    def is_own(self, given: str | bytes) -> bool:
        """False if an id or token is one of another server."""
        return _name_in(given) in ("", self.name)

    def check_own(self, given: str | bytes, field: str) -> None:
        """Raises OtherInstance if an id or token, whose `field` it is, is one of another server."""
        self._check(_name_in(given), field)

    def check_called(self, context: grpc.aio.ServicerContext) -> None:
        """Raises OtherInstance if the call's metadata names another server."""
        for key, value in context.invocation_metadata() or ():
            if key == KEY and value != self.header[1]:
                self._check(_decoded(value), KEY)

    def _check(self, name: str, field: str) -> None:
        if name not in ("", self.name):
            raise OtherInstance(
                f"it is on the server {name}, and this is {self.name}: let the balancer send calls with the metadata "
                f"{KEY} to the server that they name",
                instance=name,
                field=field,
            )


def _name_in(given: str | bytes) -> str:
    """The name in an id or token; "" if it has none."""
    text = given.decode("latin-1") if isinstance(given, bytes) else given
    name, separator, _ = text.partition(SEPARATOR)
    return name if separator and NAME.fullmatch(name) else ""


def _decoded(value: str | bytes) -> str:
    """The name in the metadata; "" if that is not valid."""
    try:
        name = base64.b64decode(value, validate=True).decode("latin-1")
    except (binascii.Error, ValueError):
        return ""
    return name if NAME.fullmatch(name) else ""
