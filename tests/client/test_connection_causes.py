"""Why a call failed is in its error's message and in its cause, for every way in which gRPC reports it."""

import datetime
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest

from steer_client import AsyncSteerClient, EngineFailed, InvalidRequest, SteerError, tls_credentials
from steer_client.http_proxies import HttpProxy, proxy_for
from steer_service.testing.fake_backend import FakeBackend
from tests.cli.test_healthcheck import answering
from tests.client.conftest import BOUND_S, Serve
from tests.client.http2 import DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, frame, header, reset
from tests.client.http2 import server_that_ends_calls as server_ending
from tests.server.test_certificates import NOW, Authority, ours, settings, theirs  # noqa: F401  (fixtures)


async def failure(address: str, **options: Any) -> SteerError:
    """The error of a generation; its cause is gRPC's."""
    once = [("grpc.enable_retries", 0)]  # gRPC's own retries take most of a second and change no text
    async with AsyncSteerClient(address, timeout_s=BOUND_S, channel_options=once, **options) as client:
        with pytest.raises(SteerError) as raised:
            await client.generate(["hello"], max_tokens=2, retry_timeout_s=0)
    assert isinstance(raised.value.__cause__, grpc.RpcError)
    return raised.value


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


async def test_no_server(dead_address: str, short_folder: str) -> None:
    for address, cause in (
        (dead_address, "the connection is refused"),
        (f"unix:{short_folder}/none", "there is no such socket"),
        ("no-such-host.invalid:50051", "the host name is not known to DNS"),
    ):
        error = await failure(address)
        assert (error.reason, error.message) == ("UNREACHABLE", f"no server answers at {address}: {cause}")


async def test_the_properties_say_it_too(dead_address: str) -> None:
    with pytest.raises(EngineFailed, match="the connection is refused") as raised:
        _ = AsyncSteerClient(dead_address).hidden_size
    assert isinstance(raised.value.__cause__, grpc.RpcError)


async def test_a_handshake_that_fails_says_why(
    serve: Serve,
    settings: dict[str, str],  # noqa: F811
    ours: Authority,  # noqa: F811
    theirs: Authority,  # noqa: F811
) -> None:
    def named(server: Any, host: str = "localhost") -> str:
        return str(server.address).replace("0.0.0.0", host)

    old = ours.issue("old", "localhost", not_after=NOW - datetime.timedelta(hours=1))
    expired = grpc.aio.server()
    pair = old.key.read_bytes(), old.cert.read_bytes()
    port = expired.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await expired.start()
    tls = serve(None, "0.0.0.0:0", **settings)
    asking = serve(None, "0.0.0.0:0", **settings, tls_client_ca=str(ours.cert))
    mine, other = tls_credentials(ca=ours.cert), tls_credentials(ca=theirs.cert)
    for address, credentials, cause, reason in (
        (serve().address, mine, "the server has no TLS; leave out `credentials`", "TLS_FAILED"),
        (named(tls), other, "pass its authority as tls_credentials(ca=...)", "TLS_FAILED"),
        (named(tls, "127.0.0.2"), mine, "is for another name", "TLS_FAILED"),
        (f"localhost:{port}", mine, "has expired or is not valid yet", "TLS_FAILED"),
        (named(asking), mine, "it may ask for a client certificate", "UNREACHABLE"),
        (named(tls), None, "if it has TLS, pass credentials=tls_credentials()", "UNREACHABLE"),
    ):
        error = await failure(address, credentials=credentials)
        assert (error.reason, cause in error.message) == (reason, True), error.message
        assert error.message.startswith("no server answers") == (reason == "UNREACHABLE")
    await expired.stop(None)


async def test_what_is_no_grpc_server_is_named() -> None:
    with answering(b"HTTP/1.1 503 Service Unavailable\r\n\r\n") as address:
        error = await failure(address)
    assert error.reason == "UNREACHABLE"
    assert error.message.endswith("is not a gRPC server; it does not speak HTTP/2 with the HTTP status 503")


@pytest.mark.parametrize(
    ("answer", "reason", "cause"),
    [
        ("HTTP/1.1 403 Forbidden\r\n\r\n", "PROXY_REFUSED", "refuses to connect to it with the HTTP status 403"),
        ("HTTP/1.1 502 Bad Gateway\r\n\r\n", "UNREACHABLE", "refuses to connect to it with the HTTP status 502"),
    ],
)
async def test_an_http_proxy_and_its_variable_are_named(
    answer: str, reason: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(answer.encode()) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:secret@{proxy}")
        error = await failure("somewhere.invalid:50051")

    assert (error.reason, cause in error.message) == (reason, True)
    assert f"the HTTP proxy {proxy} of http_proxy" in error.message
    assert "no_proxy" in error.message
    assert "secret" not in error.message


async def test_a_proxy_that_is_not_there_is_named(dead_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://{dead_address}")
    error = await failure("somewhere.invalid:50051")

    assert error.reason == "UNREACHABLE"
    assert f"refused; the connection goes through the HTTP proxy {dead_address} of https_proxy" in error.message


@pytest.mark.parametrize(
    ("address", "environment", "variable"),
    [
        ("far:1", {}, None),
        ("far:1", {"http_proxy": "http://p:3128"}, "http_proxy"),
        ("far:1", {"http_proxy": "http://p:3128", "grpc_proxy": "http://p:3128"}, "grpc_proxy"),
        ("far:1", {"HTTP_PROXY": "http://p:3128"}, None),
        ("far:1", {"http_proxy": "p:3128"}, None),
        ("far:1", {"http_proxy": "http://p:3128", "no_proxy": "near, far"}, None),
        ("far:1", {"http_proxy": "http://p:3128", "no_grpc_proxy": "near", "no_proxy": "far"}, "http_proxy"),
        ("localhost:1", {"http_proxy": "http://p:3128"}, None),
        ("unix:/far", {"http_proxy": "http://p:3128"}, None),
    ],
)
def test_the_variables_are_read_as_grpc_reads_them(
    address: str, environment: dict[str, str], variable: str | None
) -> None:
    assert proxy_for(address, {}, environment) == (HttpProxy(variable, "p:3128") if variable else None)


def response(stream: int, *pairs: tuple[str, str], end: bool = True) -> bytes:
    fields = b"".join(header(name.encode(), value.encode()) for name, value in pairs)
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, fields)


def status(code: int, message: str) -> Callable[[int], Sequence[bytes | None]]:
    pairs = (
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-status", str(code)),
        ("grpc-message", message),
    )
    return lambda stream: [response(stream, *pairs)]


def http_status(code: int, body: bytes = b"") -> Callable[[int], Sequence[bytes | None]]:
    fields = (":status", str(code)), ("content-type", "text/html")
    if not body:
        return lambda stream: [response(stream, *fields)]
    return lambda stream: [response(stream, *fields, end=False), frame(DATA, END_STREAM, stream, body)]


PINGS = frame(GOAWAY, 0, 0, struct.pack(">II", 0, 11) + b"too_many_pings")

PROXIES = {
    "no server": (
        status(14, "no healthy upstream"),
        "UNREACHABLE",
        "a proxy there reaches no server behind it: no healthy",
    ),
    "reset": (status(14, "upstream connect error or disconnect"), "UNREACHABLE", "reaches no server behind it"),
    "route timeout": (status(14, "upstream request timeout"), "ROUTE_TIMEOUT", "its limit on the time of a route"),
    "deadline of another": (status(4, "too late"), "ROUTE_TIMEOUT", "its limit on the time of a route"),
    "access": (
        status(7, "RBAC: access denied"),
        "PERMISSION_DENIED",
        "and not the server, says so: RBAC: access denied",
    ),
    "no route": (status(12, ""), "UNKNOWN_METHOD", "a proxy or a web server that has no route for it"),
    "another 503": (status(14, "denied"), "UNREACHABLE", "denied"),
    "503": (http_status(503), "UNREACHABLE", "a proxy or a web server there answers with the HTTP status 503"),
    "404": (http_status(404), "UNKNOWN_METHOD", "has no route for it (HTTP status 404)"),
    "504": (http_status(504), "ROUTE_TIMEOUT", "its limit on the time of a route"),
    "pings": (lambda _: [PINGS, None], "CONNECTION_LOST", "`grpc.keepalive_time_ms` in channel_options"),
}


@pytest.mark.parametrize("name", PROXIES)
async def test_what_a_proxy_says_is_told_from_what_the_server_says(name: str) -> None:
    ending, reason, cause = PROXIES[name]
    async with server_ending(ending, begins=False) as address:
        error = await failure(address)
    assert (error.reason, cause in error.message) == (reason, True), error.message


async def test_a_page_is_told_by_its_status_or_by_the_lack_of_one_of_grpc() -> None:
    """Which of the two gRPC notices first is chance."""
    async with server_ending(http_status(503, b"<html></html>"), begins=False) as address:
        error = await failure(address)
    assert error.reason in ("UNREACHABLE", "CONNECTION_LOST")
    assert "answers with the HTTP status 503" in error.message or "as a page of a proxy" in error.message


async def test_a_route_timeout_a_lost_server_and_a_failed_engine_differ(serve: Serve) -> None:
    """Once a response has begun, a proxy only resets the call: it does not say why."""
    died = EngineFailed("the engine died", reason="ENGINE_DIED", retry_after_s=1.0)
    errors = [await failure(serve(FakeBackend(failure=died)).address)]
    for ending in (lambda stream: [reset(stream, 2)], lambda _: [None]):
        async with server_ending(ending, begins=True) as address:
            errors.append(await failure(address))

    assert [error.reason for error in errors] == ["ENGINE_DIED", "CONNECTION_LOST", "CONNECTION_LOST"]
    assert errors[0].message == "the engine died"
    assert "a proxy reset the call after 0." in errors[1].message
    assert "a proxy" not in errors[2].message


async def test_a_message_that_is_too_large_is_told_with_its_size_and_side(serve: Serve) -> None:
    address = serve(max_message_bytes=1 << 20).address
    async with AsyncSteerClient(address) as client:
        with pytest.raises(
            InvalidRequest, match=r"the receiver accepts: 2,\d{3},\d{3} bytes, and 1,048,576 are allowed"
        ):
            await client.generate("x" * (2 << 20))
    for option, said in (("send", "this client sends"), ("receive", "this client accepts")):
        limit = (f"grpc.max_{option}_message_length", 10)
        async with AsyncSteerClient(address, channel_options=[limit]) as client:
            with pytest.raises(InvalidRequest, match=f"{said}.*see {limit[0]}"):
                await client.generate("hello" * 10)


async def test_a_host_that_drops_packets_is_a_call_that_took_too_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with AsyncSteerClient(address, timeout_s=0.2) as client:
            with pytest.raises(SteerError, match=r"generate took longer than 0\.2 s, the timeout_s of the client"):
                await client.generate(["hello"])
