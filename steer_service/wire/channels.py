"""What every channel to a server needs: its address, TLS credentials and a bearer token.

Imports gRPC and nothing else that is slow: `steer healthcheck` starts every few seconds.
"""

import ssl
from contextlib import suppress
from pathlib import Path

import grpc

from steer_service.core.errors import InvalidRequest
from steer_service.core.small_file import read_small

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""The default address of `steer serve`."""


def check_address(address: str) -> None:
    """Raises InvalidRequest unless `address` is `host:port`, `dns:` and a name, or `unix:` and a path."""
    if address.startswith("unix:"):
        return
    if "://" in address and not address.startswith("dns:"):
        raise InvalidRequest(
            f"{address!r} is a URL; write host:port or unix:/path", reason="BAD_ADDRESS", field="address"
        )
    if not address.rpartition(":")[2].isdecimal():
        raise InvalidRequest(f"{address!r} has no port; write host:port", reason="BAD_ADDRESS", field="address")


def is_this_machine(address: str) -> bool:
    """True for an address to which no HTTP proxy leads."""
    return address.startswith(("unix:", "localhost:", "127.", "[::1]:"))


def check_bearer_token(token: str) -> None:
    """Raises InvalidRequest (BAD_BEARER_TOKEN) for a token with characters that cannot be sent."""
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise InvalidRequest(
            "it has characters that cannot be sent: a token is ASCII without spaces and line ends",
            reason="BAD_BEARER_TOKEN",
            field="token",
        )


def bearer_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries `token`; empty for ""."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def tls_credentials(
    *, ca: str | Path | None = None, cert: str | Path | None = None, key: str | Path | None = None
) -> grpc.ChannelCredentials:
    """Credentials of a connection with TLS, from PEM files.

    `ca`: the authorities that may have signed the server's certificate (default: those of gRPC). `cert` and `key`: the
    client's own, where the server asks for one. Raises InvalidRequest (BAD_CERTIFICATE) for a file that cannot be read,
    or that holds something else: gRPC would blame the client's certificate for it, at the first call.
    """
    if (cert is None) != (key is None):
        raise InvalidRequest("a certificate and its key go together", reason="BAD_CERTIFICATE", field="cert")
    pem = {}
    for name, path in (("ca", ca), ("cert", cert), ("key", key)):
        try:
            pem[name] = None if path is None else read_small(path)
        except OSError as error:
            message = f"{path} cannot be read: {error.strerror}"
            raise InvalidRequest(message, reason="BAD_CERTIFICATE", field=name) from error
        content = pem[name]
        what = "a private key" if name == "key" else "a certificate"
        if content is not None and not (_has_key(content) if name == "key" else _has_certificate(content)):
            found = _content_of(content)
            raise InvalidRequest(f"{path} has {found}, and not {what} in PEM", reason="BAD_CERTIFICATE", field=name)
    return grpc.ssl_channel_credentials(pem["ca"], pem["key"], pem["cert"])


def _content_of(pem: bytes) -> str:
    return "a private key" if _has_key(pem) else "a certificate" if _has_certificate(pem) else "something else"


def _has_key(pem: bytes) -> bool:
    return b"PRIVATE KEY-----" in pem


def _has_certificate(pem: bytes) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with suppress(ssl.SSLError, ValueError):  # those before one that is not valid are loaded
        context.load_verify_locations(cadata=pem.decode("ascii", errors="replace"))
    return context.cert_store_stats()["x509"] > 0
