"""How the commands reach a server: its address, and what it asks for.

The client is imported by `connection_from` alone: `steer healthcheck` starts every few seconds and does without.
"""

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from steer_service.core.environment import PREFIX
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.small_file import read_small
from steer_service.wire.channels import DEFAULT_ADDRESS, check_address, check_bearer_token, tls_credentials

if TYPE_CHECKING:
    from steer_client.channel import ClientOptions

ADDRESS = PREFIX + "ADDRESS"
"""Environment variable with the default address, of servers as well."""


CREDENTIALS = ("token_file", "tls", "tls_ca", "tls_cert", "tls_key")
"""Names of the options of `add_credential_arguments` in a parsed command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A server, and the options of a client that reaches it."""

    address: str
    options: "ClientOptions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a server may ask for."""

    token: str
    """Bearer token; "" for none."""
    tls: grpc.ChannelCredentials | None
    """Of a connection with TLS; None: no TLS."""


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the server's address and the credentials for it."""
    add_address_argument(parser)
    add_credential_arguments(parser)


def add_address_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the server's address."""
    parser.add_argument(
        "--address",
        default=os.environ.get(ADDRESS) or DEFAULT_ADDRESS,
        help="host:port or unix:/path (default: %(default)s)",
    )


def add_credential_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a server may ask for."""
    parser.add_argument("--token-file", metavar="PATH", help="file with the bearer token that the server asks for")
    parser.add_argument("--tls", action="store_true", help="connect with TLS; the options below imply it")
    parser.add_argument("--tls-ca", metavar="PATH", help="PEM file: authorities of the server's certificate")
    parser.add_argument("--tls-cert", metavar="PATH", help="PEM file: own certificate, if the server asks for one")
    parser.add_argument("--tls-key", metavar="PATH", help="PEM file: its private key")


def connection_from(namespace: argparse.Namespace) -> Connection:
    """The connection of a command line; raises InvalidRequest, which names the option."""
    from steer_client.channel import ClientConfig

    credentials = credentials_from(namespace)
    options: ClientOptions = {"token": credentials.token, "credentials": credentials.tls}
    ClientConfig.of(namespace.address, options)
    return Connection(address=namespace.address, options=options)


def credentials_from(namespace: argparse.Namespace) -> Credentials:
    """The credentials of a command line, whose address is checked too; raises InvalidRequest, which names the option.

    The option --tls and those that imply it make the connection one with TLS.
    """
    try:
        check_address(namespace.address)
    except InvalidRequest as error:
        if namespace.address == os.environ.get(ADDRESS):
            error.field = ADDRESS
        raise
    token = "" if namespace.token_file is None else _token_in(namespace.token_file)
    if not (namespace.tls or namespace.tls_ca or namespace.tls_cert or namespace.tls_key):
        return Credentials(token=token, tls=None)
    with within("tls"):
        tls = tls_credentials(ca=namespace.tls_ca, cert=namespace.tls_cert, key=namespace.tls_key)
    return Credentials(token=token, tls=tls)


def _token_in(path: str) -> str:
    try:
        text = read_small(path).decode(errors="replace")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field="token_file") from error
    if "[clients" in text:
        message = f"{path} is a server's token file; give the file with the token that `steer token` printed"
        raise InvalidRequest(message, field="token_file")
    token = text.strip()
    if not token:
        raise InvalidRequest(f"{path} is empty", field="token_file")
    try:
        check_bearer_token(token)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error.message}", reason=error.reason, field="token_file") from error
    return token
