"""`steer healthcheck`: one health check of a server, for the probes of containers.

A probe starts every few seconds: this file imports neither an engine nor the client, only gRPC.
"""

import argparse
import math
import socket
import ssl
import sys
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2

from steer_service.cli.connection import Credentials, add_connection_arguments, credentials_from
from steer_service.cli.exit_status import BAD_USAGE, FAILED, INTERRUPTED
from steer_service.cli.terminal import shown
from steer_service.core.errors import InvalidRequest, SteerError
from steer_service.wire.channels import bearer_metadata, is_this_machine
from steer_service.wire.connection_problems import ConnectionProblem, cause_in, problem_in

DEFAULT_TIMEOUT_S = 5.0

METHOD = "/grpc.health.v1.Health/Check"

DESCRIPTION = """\
Asks a server for its health with one call of grpc.health.v1, and exits with 0 if it is SERVING and with 1 if not. It
needs no model and no engine, and starts in a fraction of a second.

A container that serves on a Unix socket, or with TLS, is best probed at its --health-address, which has no TLS.
"""


_HANDSHAKE = "the TLS handshake with {address} fails: "
_NO_SERVER = "no server listens at {address}: none was started, or with --listen-when-ready it loads its model"

_PROXY = "a proxy answers at {address} in place of the server, and says "

_OTHER_AUTHORITY = _HANDSHAKE + "the server's certificate is not signed by an authority in --tls-ca, or has expired"

_CAUSES = {
    ConnectionProblem.SERVER_WITHOUT_TLS: _HANDSHAKE + "the server has no TLS; leave out the --tls options",
    ConnectionProblem.UNKNOWN_AUTHORITY: _OTHER_AUTHORITY,
    ConnectionProblem.EXPIRED_CERTIFICATE: _OTHER_AUTHORITY,
    ConnectionProblem.WRONG_NAME: (
        _HANDSHAKE + "the server's certificate is for another name; give that name as --tls-server-name"
    ),
    ConnectionProblem.OWN_CERTIFICATE: (
        _HANDSHAKE + "the certificate and key of this client do not belong together, or are not valid PEM"
    ),
    ConnectionProblem.HANDSHAKE: _HANDSHAKE + "{text}",
    ConnectionProblem.NOT_HTTP2: "what listens at {address} is not a gRPC server",
    ConnectionProblem.REFUSED: _NO_SERVER,
    ConnectionProblem.NO_SOCKET: _NO_SERVER,
    ConnectionProblem.UNKNOWN_HOST: (
        "the host of {address} is not known; check the name and the DNS of this container"
    ),
    ConnectionProblem.NO_UPSTREAM: (
        _PROXY + "{text!r}: no server behind it can be used. Check whether one is SERVING, with `steer healthcheck` at "
        "its own address, and then the addresses, the health checks and the TLS that the proxy uses for it"
    ),
    ConnectionProblem.ROUTE_TIMEOUT: (
        _PROXY + "{text!r}: the server behind it did not answer in the time of the proxy's route. Ask the server at "
        "its own address"
    ),
    ConnectionProblem.HTTP_STATUS: (
        _PROXY.replace("a proxy", "a proxy or a web server") + "{text!r}: check that it passes gRPC on to the server"
    ),
}
"""What the problems mean to the operator of a container."""

_CLOSED_WITH_TLS = (
    _HANDSHAKE + "the server closes the connection; it may ask for a certificate of its clients, --tls-cert and "
    "--tls-key, or not accept this one"
)
_CLOSED_WITHOUT = "the server at {address} closes the connection; if it has TLS, give --tls or --tls-ca"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One health check."""

    address: str
    """The server's."""
    credentials: Credentials
    service: str
    """Full name of a service; "" for the server."""
    timeout_s: float
    """Seconds for everything."""
    server_name: str
    """Name that the server's certificate must have; "" for the host of the address."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer healthcheck`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_connection_arguments(parser)
    parser.add_argument(
        "--tls-server-name",
        metavar="NAME",
        default="",
        help="name in the server's certificate, if it is not the host of --address, such as of a probe on localhost",
    )
    parser.add_argument("--service", metavar="NAME", default="", help="full name of a service (default: the server)")
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=DEFAULT_TIMEOUT_S, help="seconds to wait (default: %(default)g)"
    )


def run(namespace: argparse.Namespace) -> int:
    """Prints what the server says, and returns the exit status."""
    try:
        problem = problem_found_by(_check_from(namespace))
    except SteerError as error:
        print(f"steer: {error}", file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    if problem:
        print(shown(f"steer: {problem}", sys.stderr), file=sys.stderr)
        return FAILED
    print(f"steer: {namespace.address} is SERVING")
    return 0


def _check_from(namespace: argparse.Namespace) -> Check:
    """The check of a command line; raises InvalidRequest."""
    if not (math.isfinite(namespace.timeout) and namespace.timeout > 0):
        raise InvalidRequest(f"{namespace.timeout:g} is not a number of seconds above 0", field="timeout")
    credentials = credentials_from(namespace)
    if namespace.tls_server_name and credentials.tls is None:
        raise InvalidRequest("it needs --tls, or an option that implies it", field="tls_server_name")
    return Check(
        address=namespace.address,
        credentials=credentials,
        service=namespace.service,
        timeout_s=namespace.timeout,
        server_name=namespace.tls_server_name,
    )


def problem_found_by(check: Check) -> str:
    """What keeps the server from SERVING; "" if nothing does."""
    try:
        status = _status_of(check)
    except grpc.RpcError as error:
        return _cause(check, error.code(), error.details() or "")
    if status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return f"the server at {check.address} is {name}: it loads its model, starts its engine again, or stops"


def is_answered(address: str, timeout_s: float = 2.0) -> bool:
    """True if a server without TLS answers health checks at `address`, whatever its status."""
    try:
        _status_of(
            Check(
                address=address,
                credentials=Credentials(token="", tls=None),
                service="",
                timeout_s=timeout_s,
                server_name="",
            )
        )
    except grpc.RpcError:
        return False
    return True


def asks_for_tls(address: str, timeout_s: float = 2.0) -> bool:
    """True if a server of HTTP/2 with TLS listens at `address`, which is `host:port`."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
            with context.wrap_socket(connection) as secure:
                return secure.selected_alpn_protocol() == "h2"
    except (OSError, ValueError):
        return False


def _status_of(check: Check) -> int:
    """The server's answer; raises grpc.RpcError."""
    with _channel_of(check) as channel:
        ask = channel.unary_unary(
            METHOD,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        response = ask(
            health_pb2.HealthCheckRequest(service=check.service),
            timeout=check.timeout_s,
            metadata=bearer_metadata(check.credentials.token),
        )
    return int(response.status)


def _channel_of(check: Check) -> grpc.Channel:
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0 if is_this_machine(check.address) else 1)]
    if check.server_name:
        options.append(("grpc.ssl_target_name_override", check.server_name))
    if check.credentials.tls is None:
        return grpc.insecure_channel(check.address, options=options)
    return grpc.secure_channel(check.address, check.credentials.tls, options=options)


def _cause(check: Check, code: grpc.StatusCode, text: str) -> str:
    """The sentence for a call that failed."""
    address = check.address
    match code:
        case grpc.StatusCode.NOT_FOUND:
            return (
                f"the server at {address} has no service {check.service!r}; leave out --service to ask for the server"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"a gRPC server without health checks listens at {address}; give the address of `steer serve`"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer from {address} within {check.timeout_s:g} s"
        case grpc.StatusCode.UNAVAILABLE:
            return _why_unavailable(address, text, has_tls=check.credentials.tls is not None)
        case _:
            return f"the health check of {address} failed: {code.name}: {text}"


def _why_unavailable(address: str, text: str, *, has_tls: bool) -> str:
    problem = problem_in(text)
    if problem is ConnectionProblem.CLOSED_AT_ONCE:
        sentence = _CLOSED_WITH_TLS if has_tls else _CLOSED_WITHOUT
    else:
        sentence = "no server answers at {address}: {text}" if problem is None else _CAUSES.get(problem, "")
    return (sentence or "no server answers at {address}: {text}").format(address=address, text=cause_in(text))
