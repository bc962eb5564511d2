"""`steer token NAME`: makes a bearer token for a client of `steer serve --token-file`."""

import argparse
import hashlib
import os
import secrets
import sys

from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_identifier

TOKEN_BYTES = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `steer token`."""
    parser.add_argument("name", help="name of the client, which owns what its calls leave on the server")
    parser.add_argument(
        "--file",
        metavar="PATH",
        help="token file of the server, to which the client is added (default: print the entry)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Prints the token; the file has its SHA-256 only, so that it can be seen once."""
    try:
        check_identifier(namespace.name, "name")
    except InvalidRequest as error:
        print(f"steer: {error}", file=sys.stderr)
        return BAD_USAGE
    token = secrets.token_urlsafe(TOKEN_BYTES)
    entry = f'[clients."{namespace.name}"]\nsha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]\n'
    if namespace.file is None:
        print(f"Entry of the server's token file:\n\n{entry}\nToken of the client:\n", file=sys.stderr)
    else:
        problem = _add(namespace.file, namespace.name, entry)
        if problem:
            print(f"steer: {namespace.file}: {problem}", file=sys.stderr)
            return FAILED
    print(token)
    return 0


def _add(path: str, name: str, entry: str) -> str:
    """Adds an entry to the file, which is made if it does not exist; returns what keeps it from doing so, or ""."""
    from steer_service.server.tokens import read_clients

    try:
        known = read_clients(path) if os.path.exists(path) and os.path.getsize(path) else ()
        if name in {client.name for client in known}:
            return f"client {name} is there; add the SHA-256 of another token to its list by hand"
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
            file.write(("\n" if file.tell() else "") + entry)
    except InvalidRequest as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    return ""
