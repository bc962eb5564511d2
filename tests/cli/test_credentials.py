"""`steer token`, and the commands against a server with TLS and tokens."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steer_client import connection_errors
from steer_service.cli.arguments import ADVICE_AS_FLAGS
from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.cli.main import main
from steer_service.core import checks
from steer_service.server.tokens import TokenFile
from tests.client.conftest import Serve
from tests.server.test_certificates import Authority, ours, settings  # noqa: F401  (fixtures)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_token_is_made_once_and_only_its_hash_is_in_the_file(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "tokens.toml"
    made = {}
    for name in ("alice", "bob.example"):
        status, token, err = printed(capsys, "token", name, "--file", str(path))
        assert (status, err) == (0, "")
        made[name] = token.strip()

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not [token for token in made.values() if token in path.read_text()]
    tokens = TokenFile(str(path))
    for name, token in made.items():
        client = tokens.client_of(token.encode())
        assert client is not None
        assert client.name == name
    before = path.read_text()
    status, out, err = printed(capsys, "token", "alice", "--file", str(path))
    assert (status, out, path.read_text()) == (FAILED, "", before)
    assert "client alice is there" in err


def test_without_a_file_the_entry_is_printed_beside_the_token(tmp_path: Path, capsys: Any) -> None:
    status, token, entry = printed(capsys, "token", "alice")
    path = tmp_path / "tokens.toml"
    path.write_text("\n".join(line for line in entry.splitlines() if line.startswith(("[", "sha256"))))
    assert status == 0
    assert TokenFile(str(path)).client_of(token.strip().encode()) is not None


@pytest.mark.parametrize(
    ("name", "file", "status", "problem"),
    [
        ("a b", None, BAD_USAGE, "name must be 1..128 characters"),
        ("alice", "not = [", FAILED, "it is not TOML"),
        ("alice", "folder", FAILED, "No such file or directory"),
    ],
)
def test_a_bad_name_or_file_makes_no_token(
    tmp_path: Path, capsys: Any, name: str, file: str | None, status: int, problem: str
) -> None:
    path = tmp_path / "no such folder" / "tokens.toml" if file == "folder" else tmp_path / "tokens.toml"
    if file not in (None, "folder"):
        path.write_text(file or "")
    found, out, err = printed(capsys, "token", name, *(["--file", str(path)] if file else []))
    assert (found, out) == (status, "")
    assert problem in err


@pytest.mark.usefixtures("ours")
def test_commands_reach_a_server_with_tls_and_tokens(
    serve: Serve,
    settings: dict[str, str],  # noqa: F811
    ours: Authority,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, own = tmp_path / "tokens.toml", tmp_path / "alice.token"
    own.write_text(printed(capsys, "token", "alice", "--file", str(tokens))[1])
    server = serve(**settings, token_file=str(tokens))
    monkeypatch.setenv("STEERLLM_ADDRESS", server.address.replace("127.0.0.1", "localhost"))
    prompt = ["generate", "a b", "--max-tokens", "2"]

    status, out, _ = printed(capsys, *prompt, "--tls-ca", str(ours.cert), "--token-file", str(own))
    assert status == 0
    assert out.strip()
    assert printed(capsys, "render", "a b", "--tls-ca", str(ours.cert), "--token-file", str(own))[0] == 0
    status, _, err = printed(capsys, *prompt, "--tls-ca", str(ours.cert))
    none = "steer: the call needs a valid bearer token; this client sends none: give --token-file FILE"
    assert (status, err.strip()) == (FAILED, none)
    other = tmp_path / "other.token"
    other.write_text("other\n")
    status, _, err = printed(capsys, *prompt, "--tls-ca", str(ours.cert), "--token-file", str(other))
    assert (status, err.strip()) == (FAILED, "steer: the call needs a valid bearer token")
    status, _, err = printed(capsys, *prompt, "--token-file", str(own))
    assert status == FAILED
    assert "localhost" in err  # the server is named that does not answer without TLS
    assert "if it has TLS, give --tls-ca FILE or --tls" in err
    status, _, err = printed(capsys, *prompt, "--tls")  # the authorities of the system did not sign this certificate
    assert status == FAILED
    assert "give its authority as --tls-ca FILE" in err
    assert "starts one" not in err


@pytest.mark.usefixtures("ours")
def test_a_failed_handshake_is_one_sentence_without_lines_of_grpc(
    serve: Serve,
    settings: dict[str, str],  # noqa: F811
) -> None:
    address = serve(**settings).address.replace("127.0.0.1", "localhost")
    command = [sys.executable, "-m", "steer_service.cli", "info", "--tls", "--address", address]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30.0, check=False)
    assert done.returncode == FAILED
    assert done.stderr.startswith("steer: ")
    assert "give its authority as --tls-ca FILE" in done.stderr
    assert "ssl_transport_security" not in done.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--tls-ca", "/no/such/file"], "steer: tls.ca: /no/such/file cannot be read: No such file or directory"),
        (["--tls-cert", "/no/such/file"], "steer: tls.cert: a certificate and its key go together"),
        (["--tls-ca", "/dev/zero"], "steer: tls.ca: /dev/zero cannot be read: it is larger than 4194304 bytes"),
        (["--token-file", "/dev/zero"], "steer: token_file: /dev/zero cannot be read: it is larger than"),
        (["--token-file", "/no/such/file"], "steer: token_file: /no/such/file cannot be read: No such file"),
        (["--token-file", "/dev/null"], "steer: token_file: /dev/null is empty"),
    ],
)
def test_bad_credentials_are_one_sentence(capsys: Any, options: list[str], problem: str) -> None:
    status, out, err = printed(capsys, "generate", "a", *options)
    assert (status, out) == (BAD_USAGE, "")
    assert err.startswith(problem)


def test_each_kind_of_token_file_is_told_from_the_other(tmp_path: Path, capsys: Any) -> None:
    servers, own = tmp_path / "tokens.toml", tmp_path / "alice.token"
    own.write_text(printed(capsys, "token", "alice", "--file", str(servers))[1])

    status, _, err = printed(capsys, "generate", "a", "--token-file", str(servers))
    assert (status, err.count("is a server's token file; give the file with the token")) == (BAD_USAGE, 1)
    own_to_server = printed(capsys, "serve", "--port", "0", "--token-file", str(own))
    assert own_to_server == (
        BAD_USAGE,
        "",
        (
            f"steer: --token-file: {own}: it has the token of a client, and not the clients of a server; `steer token "
            f"NAME --file {own}` writes such a file (BAD_TOKEN_FILE)\n"
        ),
    )
    own.write_text("two words")
    status, _, err = printed(capsys, "info", "--token-file", str(own))
    assert (status, err.startswith(f"steer: token_file: {own}: it has characters that cannot be sent")) == (2, True)


def test_a_file_that_holds_something_else_is_named(ours: Authority, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    pem = ours.issue("client", "localhost")
    text = tmp_path / "text"
    text.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    for options, problem in (
        (["--tls-ca", str(pem.key)], f"tls.ca: {pem.key} has a private key, and not a certificate in PEM"),
        (["--tls-ca", str(text)], f"tls.ca: {text} has something else, and not a certificate in PEM"),
        (
            ["--tls-cert", str(pem.cert), "--tls-key", str(ours.cert)],
            f"tls.key: {ours.cert} has a certificate, and not a private key in PEM",
        ),
    ):
        assert printed(capsys, "info", *options) == (BAD_USAGE, "", f"steer: {problem}\n")


def test_advice_of_the_client_that_is_put_into_flags_is_what_the_client_says() -> None:
    said = "".join(Path(str(one.__file__)).read_text(encoding="utf-8") for one in (connection_errors, checks))
    assert [advice for advice, _ in ADVICE_AS_FLAGS if advice not in said] == []
