"""What gRPC's text for a failed call says about the connection: one table for the client and for `steer healthcheck`.

Imports nothing that is slow: `steer healthcheck` starts every few seconds.
"""

import re
from enum import Enum, auto

HANDSHAKE_FAILED = "handshake failed"
"""In gRPC's text for a connection where one side does not accept the certificate of the other."""

NEVER_CONNECTED = "failed to connect to all addresses"
"""In gRPC's text for a call that was never sent, since no connection was made."""


class ConnectionProblem(Enum):
    """Why a call reached no server, or did not come back from it."""

    SERVER_WITHOUT_TLS = auto()
    """A client with TLS, and a server without."""
    EXPIRED_CERTIFICATE = auto()
    """The server's certificate has expired, or is not valid yet."""
    UNKNOWN_AUTHORITY = auto()
    """The client does not know the authority of the server's certificate."""
    WRONG_NAME = auto()
    """The server's certificate is for another name."""
    OWN_CERTIFICATE = auto()
    """The client's own certificate and key cannot be used."""
    HANDSHAKE = auto()
    """Any other failure of TLS."""
    HTTP_PROXY = auto()
    """The HTTP proxy of an environment variable refuses the connection."""
    NOT_HTTP2 = auto()
    """What listens does not speak HTTP/2, such as a web server."""
    REFUSED = auto()
    """Nothing listens."""
    NO_SOCKET = auto()
    """There is no such Unix socket."""
    UNKNOWN_HOST = auto()
    """The host name has no address."""
    NO_ROUTE = auto()
    """The network has no way to the host."""
    CONNECT_TIMEOUT = auto()
    """Nothing answered in time."""
    CLOSED_AT_ONCE = auto()
    """The other side closes each connection before HTTP/2 has begun."""
    TOO_MANY_PINGS = auto()
    """The other side closed the connection because the client checks it too often."""
    ROUTE_TIMEOUT = auto()
    """A proxy ended the call because it took longer than the proxy allows."""
    NO_UPSTREAM = auto()
    """A proxy answers, and reaches no server behind it."""
    HTTP_STATUS = auto()
    """A proxy or a web server answers with a status of HTTP, and not of gRPC."""
    NO_STATUS = auto()
    """The response ended without a status of gRPC."""
    RESET = auto()
    """The call was reset and the connection kept, as by a proxy."""
    GOAWAY = auto()
    """The other side closed the connection in an orderly way."""


_PARTS = (
    ("WRONG_VERSION_NUMBER", ConnectionProblem.SERVER_WITHOUT_TLS),
    ("certificate has expired", ConnectionProblem.EXPIRED_CERTIFICATE),
    ("certificate is not yet valid", ConnectionProblem.EXPIRED_CERTIFICATE),
    ("CERTIFICATE_VERIFY_FAILED", ConnectionProblem.UNKNOWN_AUTHORITY),
    ("Hostname Verification", ConnectionProblem.WRONG_NAME),
    ("is not in peer certificate", ConnectionProblem.WRONG_NAME),  # gRPC 1.76
    ("handshaker", ConnectionProblem.OWN_CERTIFICATE),
    (HANDSHAKE_FAILED, ConnectionProblem.HANDSHAKE),
    ("HTTP proxy returned", ConnectionProblem.HTTP_PROXY),
    ("HTTP/2", ConnectionProblem.NOT_HTTP2),
    ("http1.x server", ConnectionProblem.NOT_HTTP2),  # gRPC 1.76
    ("Connection refused", ConnectionProblem.REFUSED),
    ("No such file", ConnectionProblem.NO_SOCKET),
    ("address lookup failed", ConnectionProblem.UNKNOWN_HOST),
    ("Domain name not found", ConnectionProblem.UNKNOWN_HOST),
    ("DNS resolution failed", ConnectionProblem.UNKNOWN_HOST),
    ("No route to host", ConnectionProblem.NO_ROUTE),
    ("etwork is unreachable", ConnectionProblem.NO_ROUTE),
    ("Connection timed out", ConnectionProblem.CONNECT_TIMEOUT),
    ("connection attempt timed out", ConnectionProblem.CONNECT_TIMEOUT),
    ("oo many pings", ConnectionProblem.TOO_MANY_PINGS),
    ("too_many_pings", ConnectionProblem.TOO_MANY_PINGS),
    ("upstream request timeout", ConnectionProblem.ROUTE_TIMEOUT),
    ("stream timeout", ConnectionProblem.ROUTE_TIMEOUT),
    ("no healthy upstream", ConnectionProblem.NO_UPSTREAM),
    ("upstream connect error", ConnectionProblem.NO_UPSTREAM),
    ("header with status: 504", ConnectionProblem.ROUTE_TIMEOUT),
    ("header with status:", ConnectionProblem.HTTP_STATUS),
    ("END_STREAM", ConnectionProblem.NO_STATUS),
    ("No status received", ConnectionProblem.NO_STATUS),
    ("RST_STREAM", ConnectionProblem.RESET),
    ("GOAWAY", ConnectionProblem.GOAWAY),
)
"""Part of the text of gRPC, or of Envoy -> what it means; the first that is found counts.

tests/client/test_connection_causes.py and tests/cli/test_healthcheck.py notice a change.
"""

_CLOSED = ("Socket closed", "Connection reset")

TLS_PROBLEMS = frozenset(
    {
        ConnectionProblem.SERVER_WITHOUT_TLS,
        ConnectionProblem.EXPIRED_CERTIFICATE,
        ConnectionProblem.UNKNOWN_AUTHORITY,
        ConnectionProblem.WRONG_NAME,
        ConnectionProblem.OWN_CERTIFICATE,
        ConnectionProblem.HANDSHAKE,
    }
)
"""Those that last until somebody changes a certificate or an option."""


def problem_in(text: str) -> ConnectionProblem | None:
    """The problem that gRPC's text of a failed call tells; None if it tells none that is known."""
    for part, problem in _PARTS:
        if part in text:
            return problem
    if NEVER_CONNECTED in text and any(part in text for part in _CLOSED):
        return ConnectionProblem.CLOSED_AT_ONCE
    return None


def cause_in(text: str) -> str:
    """The part of gRPC's text that is about the last attempt to connect."""
    return text.rpartition("last error: ")[2]


def http_status_in(text: str) -> int | None:
    """The status of HTTP in the text; None if there is none."""
    found = re.search(r"(?:HTTP status|with status:|response code) ?(\d{3})", text)
    return int(found[1]) if found else None
