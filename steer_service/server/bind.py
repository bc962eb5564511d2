"""Addresses to listen on, checked before gRPC binds them: gRPC does not report why it cannot."""

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from steer_service.core.errors import EngineFailed, InvalidRequest

UNIX = "unix:"


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketPermissions:
    """Who may call by a Unix socket: who may write to it."""

    mode: int
    """Permissions of its file."""
    group: int | None = None
    """Id of its group; None: this process's."""

    @contextmanager
    def applied(self, address: str) -> Iterator[None]:
        """The block binds `address`. If that is a Unix socket, nobody else may call before it has its permissions."""
        if not address.startswith(UNIX):
            yield
            return
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)
        path = unix_path(address)
        try:
            if self.group is not None:
                os.chown(path, -1, self.group)
            os.chmod(path, self.mode)
        except OSError as error:
            raise EngineFailed(
                f"cannot give the socket {path} its group and permissions: {error.strerror}",
                reason="ADDRESS_UNAVAILABLE",
            ) from error


def address_of(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(address: str) -> None:
    """Checks that a server can listen on `address`.

    Raises EngineFailed (ADDRESS_UNAVAILABLE) if it cannot, InvalidRequest (BAD_ADDRESS) if the address is not valid.
    """
    with _as_unavailable(address):
        if address.startswith(UNIX):
            _check_unix(unix_path(address))
        else:
            _check_tcp(*host_and_port(address))


class Reservation:
    """An address that this process keeps for later: connections to it are refused, and no other server can take it.

    It is kept by a socket that is bound and does not listen. A Unix socket is only checked: its file must not exist
    before a server listens.
    """

    def __init__(self, address: str) -> None:
        """Raises EngineFailed (ADDRESS_UNAVAILABLE) if it is taken, InvalidRequest (BAD_ADDRESS) if it is not valid."""
        check_free(address)
        self.address = address
        """The address, with its real port."""
        self._socket: socket.socket | None = None
        if not address.startswith(UNIX):
            host, port = host_and_port(address)
            with _as_unavailable(address):
                self._socket = _held(host, port)
            self.address = with_port(address, self._socket.getsockname()[1])

    def release(self) -> None:
        """Gives the address up, for a server of this process that binds it at once; a second call does nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def check_not_exposed(address: str) -> None:
    """Raises InvalidRequest (EXPOSED) for an address that other machines may reach."""
    if address.startswith(UNIX):
        _check_folder(os.path.dirname(unix_path(address)) or ".")
        return
    host, _ = host_and_port(address)
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        is_local = False
    if not is_local:
        raise InvalidRequest(
            f"other machines may reach {host}, and without TLS everyone between can read prompts and answers: "
            "give --tls-cert and --tls-key, or --insecure where a proxy of a mesh encrypts",
            reason="EXPOSED",
            field="address",
        )


def with_port(address: str, port: int) -> str:
    """`address` with the port that was really bound."""
    if address.startswith(UNIX):
        return address
    return address_of(host_and_port(address)[0], port)


def unix_path(address: str) -> str:
    """The path in `unix:/path` or `unix:///path`."""
    return address.removeprefix(UNIX).removeprefix("//")


def host_and_port(address: str, field: str = "address") -> tuple[str, int]:
    """The two parts of `host:port`; raises InvalidRequest (BAD_ADDRESS), which names `field`, for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{address!r} is neither host:port nor unix:/path", reason="BAD_ADDRESS", field=field)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_folder(folder: str) -> None:
    """Raises InvalidRequest (EXPOSED) if other users may replace what is in the folder."""
    try:
        found = os.stat(folder)
    except OSError:
        return  # the socket cannot be made there, which `check_free` and gRPC report
    is_open = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    if is_open or found.st_uid not in (0, os.geteuid()):
        raise InvalidRequest(
            f"other users of this machine may replace the socket in {folder}: use a folder that is yours, and that "
            "others cannot write to",
            reason="EXPOSED",
            field="address",
        )


@contextmanager
def _as_unavailable(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineFailed(
            f"cannot listen on {address}: {error.strerror or error}", reason="ADDRESS_UNAVAILABLE"
        ) from error


def _check_tcp(host: str, port: int) -> None:
    _bound(host, port, is_shared=True).close()


def _held(host: str, port: int) -> socket.socket:
    """A socket that keeps the port from others."""
    try:
        return _bound(host, port, is_shared=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Connections of an earlier server are still in TIME_WAIT.
        return _bound(host, port, is_shared=True)


def _bound(host: str, port: int, *, is_shared: bool) -> socket.socket:
    """A socket that is bound and does not listen. A shared one may be bound beside others that do not listen either."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(is_shared))
        made.bind(target)
    except BaseException:
        made.close()
        raise
    return made


def _check_unix(path: str) -> None:
    # gRPC removes an existing socket, even one on which another server listens.
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return  # no server listens
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
