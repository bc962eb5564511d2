"""TLS for the server's address: its certificate and key, and the authority of its clients' certificates.

The files are read again when they change, without a restart. Connections that are made after that get the new
certificate; those that are open stay.
"""

import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509

from steer_service.core.errors import InvalidRequest
from steer_service.core.small_file import read_small
from steer_service.server.reloaded import Reloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    """Paths of PEM files."""

    cert: str
    """The server's certificate, with those between it and its authority."""
    key: str
    """Its private key, not encrypted."""
    client_ca: str = ""
    """Certificates of authorities, one of which must have signed the certificate of each client; "" asks for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """What was read from the files."""

    configuration: Any
    """What gRPC takes."""
    expiries: Mapping[str, float]
    """See `Certificates.expiries`."""


class Certificates:
    """The files of one server, and the credentials that gRPC makes of them."""

    def __init__(self, files: CertificateFiles) -> None:
        """Raises InvalidRequest (BAD_CERTIFICATE), which names the setting, for files that are not valid."""
        self._checks_clients = bool(files.client_ca)
        paths = [path for path in (files.cert, files.key, files.client_ca) if path]
        self._reloaded = Reloaded("certificate files", paths, lambda: _content(files))
        self._lock = threading.Lock()
        self._changed: Any = None

    @property
    def expiries(self) -> Mapping[str, float]:
        """`server` and `client_ca` -> when the first certificate of the file expires, in seconds since 1970."""
        return self._reloaded.value.expiries

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for `add_secure_port`; with an authority of clients, a client without a certificate is refused.

        The refusal is that of the handshake: the client sees a connection that fails.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._reloaded.value.configuration, self._fetch, require_client_authentication=self._checks_clients
        )

    def refresh(self) -> None:
        """Reads the files again if they have changed. Those that are not valid are logged, and change nothing."""
        if self._reloaded.refresh():
            with self._lock:
                self._changed = self._reloaded.value.configuration

    def _fetch(self) -> Any:
        """What gRPC takes for this handshake and all later ones; None: what it has. Called in threads of gRPC's own."""
        with self._lock:
            changed, self._changed = self._changed, None
        return changed


def _content(files: CertificateFiles) -> _Content:
    """The content of the files; raises InvalidRequest."""
    pem = {name: _read(getattr(files, name), f"tls_{name}") for name in ("cert", "key", "client_ca")}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError, as that of a file that has just gone
        raise _bad(
            f"this key and tls_cert do not belong together, or are not valid PEM: {_text(error)}", "key"
        ) from error
    if files.client_ca:
        try:
            context.load_verify_locations(cadata=pem["client_ca"].decode())
        except (OSError, ValueError) as error:
            raise _bad(f"it has no valid certificates in PEM: {_text(error)}", "client_ca") from error
    configuration = grpc.ssl_server_certificate_configuration(
        [(pem["key"], pem["cert"])], root_certificates=pem["client_ca"] or None
    )
    return _Content(
        configuration=configuration, expiries=_expiries({"server": pem["cert"], "client_ca": pem["client_ca"]})
    )


def _expiries(pem: Mapping[str, bytes]) -> dict[str, float]:
    expiries = {}
    for name, text in pem.items():
        # None, or one that OpenSSL accepts and this library does not: it is served all the same.
        with suppress(ValueError):
            certificates = x509.load_pem_x509_certificates(text)
            expiries[name] = min(one.not_valid_after_utc.timestamp() for one in certificates)
    return expiries


def _read(path: str, setting: str) -> bytes:
    if not path:
        return b""
    try:
        return read_small(path)
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}"
        raise InvalidRequest(message, reason="BAD_CERTIFICATE", field=setting) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _text(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)


def _bad(message: str, name: str) -> InvalidRequest:
    return InvalidRequest(message, reason="BAD_CERTIFICATE", field=f"tls_{name}")
