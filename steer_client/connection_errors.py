"""The SteerError of a call that failed, with the cause in a sentence: no server, TLS, a proxy, a lost connection."""

import grpc

from steer_client.channel import ClientConfig, channel_options
from steer_client.http_proxies import proxy_for
from steer_service.core.errors import EngineFailed, SteerError, Unauthenticated
from steer_service.runtime.deadline import CallLimit
from steer_service.wire.connection_problems import (
    TLS_PROBLEMS,
    ConnectionProblem,
    cause_in,
    http_status_in,
    problem_in,
)
from steer_service.wire.status_codes import LOST_RETRY_S, error_from_rpc, is_of_server

DEADLINE_SLACK_S = 0.25
"""A deadline that passes so much before the caller's own is another's: gRPC sends the caller's, a little rounded."""

_NO_SERVER = {
    ConnectionProblem.SERVER_WITHOUT_TLS: "the TLS handshake fails: the server has no TLS; leave out `credentials`",
    ConnectionProblem.EXPIRED_CERTIFICATE: (
        "the TLS handshake fails: the server's certificate has expired or is not valid yet; compare it with the clock"
    ),
    ConnectionProblem.UNKNOWN_AUTHORITY: (
        "the TLS handshake fails: none of the authorities that this client accepts has signed the server's "
        "certificate; pass its authority as tls_credentials(ca=...)"
    ),
    ConnectionProblem.WRONG_NAME: (
        "the TLS handshake fails: the server's certificate is for another name; connect to that name, or give it as "
        "`grpc.ssl_target_name_override` in channel_options"
    ),
    ConnectionProblem.OWN_CERTIFICATE: (
        "the TLS handshake fails: the client's certificate and key do not belong together, or are not valid PEM"
    ),
    ConnectionProblem.HANDSHAKE: "the TLS handshake fails: {text}",
    ConnectionProblem.NOT_HTTP2: "what listens there is not a gRPC server; it does not speak HTTP/2{status}",
    ConnectionProblem.REFUSED: "the connection is refused",
    ConnectionProblem.NO_SOCKET: "there is no such socket",
    ConnectionProblem.UNKNOWN_HOST: "the host name is not known to DNS",
    ConnectionProblem.NO_ROUTE: "the network has no route to it",
    ConnectionProblem.CONNECT_TIMEOUT: "the connection is not accepted in time; a firewall may drop its packets",
    ConnectionProblem.NO_UPSTREAM: "a proxy there reaches no server behind it: {text}",
    ConnectionProblem.HTTP_STATUS: "a proxy or a web server there answers{status}",
}
"""Why no server answers."""

_CLOSED_WITH_TLS = (
    "it closes the connection after the TLS handshake; it may ask for a client certificate, "
    "tls_credentials(cert=..., key=...), or not accept this one"
)
_CLOSED_WITHOUT = (
    "it closes each connection at once; if it has TLS, pass credentials=tls_credentials(), and if it is a balancer, "
    "look for a server behind it"
)

_LOST = {
    ConnectionProblem.TOO_MANY_PINGS: (
        "the other side takes its keepalive for too many pings; raise `grpc.keepalive_time_ms` in channel_options, or "
        "lower the shortest interval of pings that the server or the proxy accepts "
        "(`grpc.http2.min_ping_interval_without_data_ms`)"
    ),
    ConnectionProblem.RESET: (
        "a proxy reset the call{after}; its limit on the time of a route or of silence passed, or it lost the server"
    ),
    ConnectionProblem.NO_STATUS: (
        "the response ended without a status of gRPC{after}, as a page of a proxy or of a web server does"
    ),
    ConnectionProblem.GOAWAY: "the server or a proxy closed the connection{after}",
}
"""Why a connection was lost."""


def error_from_call(
    error: grpc.RpcError,
    config: ClientConfig,
    *,
    has_events: bool = False,
    limit: CallLimit | None = None,
    elapsed_s: float | None = None,
) -> SteerError:
    """The SteerError for a failed call of a client.

    `has_events`: it had yielded any. `limit`: the limit that the call had, for the error when that has passed.
    `elapsed_s`: seconds from its start.
    """
    translated = error_from_rpc(error)
    text = (error.details() if hasattr(error, "details") else None) or ""
    problem = problem_in(text)
    told = {
        "text": cause_in(text),
        "status": f" with the HTTP status {http_status_in(text)}" if http_status_in(text) else "",
        "after": f" after {elapsed_s:.1f} s" if elapsed_s is not None else "",
    }
    made: SteerError
    if is_of_server(error):
        if limit is not None and translated.reason == "DEADLINE_EXCEEDED" and limit.left_s <= DEADLINE_SLACK_S:
            return limit.exceeded()  # the server knows the caller's deadline
        return with_advice(translated, config)
    if translated.reason == "DEADLINE_EXCEEDED" and limit is not None:
        made = limit.exceeded() if limit.left_s <= DEADLINE_SLACK_S else _route_timeout(config, told)
    elif translated.reason == "ROUTE_TIMEOUT":
        made = _route_timeout(config, told)
    elif translated.reason not in ("UNREACHABLE", "CONNECTION_LOST"):
        return translated
    elif translated.reason == "CONNECTION_LOST" or has_events:
        cause = _LOST[problem].format(**told) if problem in _LOST else told["text"]
        message = f"the connection to the server at {config.address} was lost: {cause}"
        made = EngineFailed(message, reason="CONNECTION_LOST", retry_after_s=LOST_RETRY_S)
    else:
        made = _unreachable(config, problem, told)
    made.x_request_id = translated.x_request_id
    return made


def with_advice(refused: SteerError, config: ClientConfig) -> SteerError:
    """A refusal of the server, with what it cannot know: that this client sends no token."""
    keys = {key for key, _ in config.metadata}
    if isinstance(refused, Unauthenticated) and not config.token and "authorization" not in keys:
        refused.message += "; this client sends none: pass token=..."
    return refused


def _route_timeout(config: ClientConfig, told: dict[str, str]) -> SteerError:
    message = (
        f"a proxy between this client and the server at {config.address} ended the call{told['after']}: its limit on "
        f"the time of a route passed ({told['text']}); raise it, or switch it off for response streams"
    )
    return EngineFailed(message, reason="ROUTE_TIMEOUT")


def _unreachable(config: ClientConfig, problem: ConnectionProblem | None, told: dict[str, str]) -> SteerError:
    options = {**dict(channel_options(config.address)), **dict(config.channel_options)}
    proxy = proxy_for(config.address, options)
    if problem is ConnectionProblem.CLOSED_AT_ONCE:
        cause = _CLOSED_WITHOUT if config.credentials is None else _CLOSED_WITH_TLS
    elif problem is ConnectionProblem.HTTP_PROXY:
        cause = f"{proxy or 'the HTTP proxy'} refuses to connect to it{told['status']}"
    else:
        cause = _NO_SERVER.get(problem, "{text}").format(**told) if problem is not None else told["text"]
    is_answered = problem in TLS_PROBLEMS  # by something that takes part in the handshake, or speaks without TLS
    failed = "no connection to the server" if is_answered else "no server answers"
    message = f"{failed} at {config.address}: {cause}"
    if proxy is not None:
        message += f"; the connection goes through {proxy}: unset it, or add the host to no_proxy, to connect directly"
    if is_answered:
        return EngineFailed(message, reason="TLS_FAILED")
    if problem is ConnectionProblem.HTTP_PROXY and not told["status"].endswith(("502", "503", "504")):
        return EngineFailed(message, reason="PROXY_REFUSED")
    return EngineFailed(message, reason="UNREACHABLE")
