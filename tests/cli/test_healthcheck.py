"""`steer healthcheck` against real servers: what it says and its exit status, for every way in which a check fails."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.cli.main import main
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from tests.client.conftest import Serve
from tests.server.served import bounded
from tests.server.test_certificates import Authority, ours, settings, theirs  # noqa: F401  (fixtures)

SLOW_TO_IMPORT = ("torch", "vllm", "transformers", "numpy", "steer_client", "steer_service.engine")
MOST_CPU_S = 0.5

PROBE = f"""
import resource, sys
from steer_service.cli.main import main
status = main(["healthcheck", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_SELF)
print([name for name in {SLOW_TO_IMPORT} if name in sys.modules], used.ru_utime + used.ru_stime < {MOST_CPU_S})
sys.exit(status)
"""


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns its exit status, its standard output and its standard error."""

    def run(address: str, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["healthcheck", "--address", address, *arguments])
        return status, *capsys.readouterr()

    return run


def test_a_probe_starts_quickly_and_prints_one_line(serve: Serve, dead_address: str) -> None:
    for address, status, out, err in (
        (serve().address, 0, "steer: {} is SERVING\n", ""),
        (dead_address, FAILED, "", "steer: no server listens at {}: "),
    ):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, "--address", address], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (status, out.format(address) + "[] True\n")
        assert done.stderr.startswith(err.format(address))
        assert done.stderr.count("\n") == status


def test_the_address_of_the_environment_is_the_default(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = serve().address
    monkeypatch.setenv("STEERLLM_ADDRESS", address)
    assert main(["healthcheck"]) == 0
    assert capsys.readouterr().out == f"steer: {address} is SERVING\n"


async def test_a_server_that_loads_its_model_is_not_serving(check) -> None:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", health_address="127.0.0.1:0", grace_s=0.0))
    await server.listen()
    try:
        for address in (server.address, server.health_address):
            status, _, err = await asyncio.to_thread(check, address)
            assert (status, err.partition(": it loads")[0]) == (
                FAILED,
                f"steer: the server at {address} is NOT_SERVING",
            )
        await server.open(FakeBackend())
        for address in (server.address, server.health_address):
            assert (await asyncio.to_thread(check, address))[0] == 0
    finally:
        await bounded(server.drain())


def test_a_unix_socket_is_probed_too(serve: Serve, short_folder: str, check) -> None:
    assert check(serve(address=f"unix:{short_folder}/s").address)[0] == 0
    status, _, err = check(f"unix:{short_folder}/none")
    assert status == FAILED
    assert err.startswith(f"steer: no server listens at unix:{short_folder}/none: ")


def test_a_service_is_known_or_not(serve: Serve, check) -> None:
    address = serve().address
    assert check(address, "--service", "steer.v1.GenerationService")[0] == 0
    status, _, err = check(address, "--service", "other")
    assert (status, err) == (
        FAILED,
        f"steer: the server at {address} has no service 'other'; leave out --service to ask for the server\n",
    )


@pytest.fixture
def local(serve: Serve, settings: dict[str, str], ours: Authority) -> tuple[str, str]:  # noqa: F811
    """A server with TLS and another that asks for certificates too, by the name in their certificate."""
    servers = serve(None, "0.0.0.0:0", **settings), serve(None, "0.0.0.0:0", **settings, tls_client_ca=str(ours.cert))
    plain, mutual = (server.address.replace("0.0.0.0", "localhost") for server in servers)
    return plain, mutual


def test_servers_with_tls_are_probed_with_the_options_of_every_command(
    local: tuple[str, str],
    ours: Authority,  # noqa: F811
    check,
) -> None:
    client = ours.issue("client", "me")
    ca = ["--tls-ca", str(ours.cert)]
    assert check(local[0], *ca)[0] == 0
    assert check(local[1], *ca, "--tls-cert", str(client.cert), "--tls-key", str(client.key))[0] == 0
    assert check(local[0].replace("localhost", "127.0.0.2"), *ca, "--tls-server-name", "localhost")[0] == 0


def test_a_handshake_that_fails_has_its_cause(
    serve: Serve,
    local: tuple[str, str],
    ours: Authority,  # noqa: F811
    theirs: Authority,  # noqa: F811
    check,
) -> None:
    client = theirs.issue("client", "me")
    mixed = ["--tls-cert", str(client.cert), "--tls-key", str(ours.issue("other", "me").key)]
    ca = ["--tls-ca", str(ours.cert)]
    plain, elsewhere = serve().address, local[0].replace("localhost", "127.0.0.2")
    for address, options, cause in (
        (local[0], ["--tls-ca", str(theirs.cert)], "certificate is not signed by an authority in --tls-ca"),
        (elsewhere, ca, "certificate is for another name; give that name as --tls-server-name"),
        (plain, ca, "the server has no TLS; leave out the --tls options"),
        (local[1], ca, "it may ask for a certificate of its clients"),
        (local[1], [*ca, "--tls-cert", str(client.cert), "--tls-key", str(client.key)], "or not accept this one"),
        (local[1], [*ca, *mixed], "do not belong together"),
    ):
        status, _, err = check(address, *options)
        assert (status, cause in err) == (FAILED, True), err
        assert err.startswith(f"steer: the TLS handshake with {address} fails: ")
    status, _, err = check(local[0])
    assert (status, err) == (
        FAILED,
        f"steer: the server at {local[0]} closes the connection; if it has TLS, give --tls or --tls-ca\n",
    )


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """The address of something that is not a gRPC server: it answers `reply`, or nothing and stays connected."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        is_over = threading.Event()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1)
                connection.sendall(reply)
                if not reply:
                    is_over.wait()

        answered = thread.submit(answer)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        is_over.set()
        answered.result(10)


def test_what_is_no_steer_server_is_named(check) -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert check(address)[::2] == (FAILED, f"steer: what listens at {address} is not a gRPC server\n")
    with answering(b"") as address:
        assert check(address, "--timeout", "0.2")[::2] == (FAILED, f"steer: no answer from {address} within 0.2 s\n")
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    assert check(address)[::2] == (
        FAILED,
        f"steer: a gRPC server without health checks listens at {address}; give the address of `steer serve`\n",
    )
    server.stop(0).wait()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no healthy upstream", "'no healthy upstream': no server behind it can be used. Check whether one is SERVING"),
        ("upstream request timeout", "'upstream request timeout': the server behind it did not answer in the time"),
    ],
)
def test_what_a_proxy_says_is_told_as_its_own(text: str, sentence: str, check) -> None:
    def refuse(_: object, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, text)

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Check": grpc.unary_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    status, _, err = check(address)
    server.stop(0).wait()
    assert status == FAILED
    assert err.startswith(f"steer: a proxy answers at {address} in place of the server, and says {sentence}")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--timeout", "0"], "timeout: 0 is not a number of seconds above 0"),
        (["--timeout", "nan"], "timeout: nan is not a number of seconds above 0"),
        (["--tls-server-name", "x"], "tls_server_name: it needs --tls, or an option that implies it"),
        (["--address", "http://x:1"], "address: 'http://x:1' is a URL; write host:port or unix:/path"),
        (["--address", "x"], "address: 'x' has no port; write host:port"),
        (["--tls-ca", "/no/such/file"], "tls.ca: /no/such/file cannot be read: No such file or directory"),
        (["--token-file", os.devnull], f"token_file: {os.devnull} is empty"),
    ],
)
def test_bad_usage_is_one_sentence(check, arguments: list[str], problem: str) -> None:
    assert check("127.0.0.1:1", *arguments) == (BAD_USAGE, "", f"steer: {problem}\n")


def test_a_token_is_sent_and_not_needed(serve: Serve, tmp_path: Path, capsys, check) -> None:
    tokens, own = tmp_path / "tokens.toml", tmp_path / "own"
    assert main(["token", "alice", "--file", str(tokens)]) == 0
    own.write_text(capsys.readouterr().out)
    address = serve(token_file=str(tokens)).address
    assert check(address)[0] == 0
    assert check(address, "--token-file", str(own))[0] == 0
