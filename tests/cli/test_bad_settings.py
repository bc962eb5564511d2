"""A setting that is not valid is one sentence and the exit status of a wrong command line, before anything starts."""

import argparse
import os
import subprocess
import sys

import pytest

from steer_service.cli.exit_status import BAD_USAGE
from steer_service.cli.main import COMMANDS, main
from steer_service.cli.serve import add_own_arguments, run
from steer_service.core.environment import VARIABLES
from steer_service.core.setting_rules import GIB, NUMBERS, WORDS

BAD_VARIABLES = {
    "STEERLLM_GRACE_S": ("abc", "'abc' is not a number"),
    "STEERLLM_SHM_TTL": ("-1", "-1.0 is outside 0..1000000 seconds"),
    "STEERLLM_METRICS_PORT": ("65536", "65536 is outside 0..65535"),
    "STEERLLM_MAX_CONCURRENT_REQUESTS": ("0", "0 is outside 1..2147483647"),
    "STEERLLM_SHARED_MEMORY": ("yes", "'yes' is not a whole number"),
    "STEERLLM_MAX_SHM_GB": ("0", "'0' is not a positive number of GiB"),
    "STEERLLM_CAPTURE_METADATA": ("maybe", "'maybe' is not 0, 1, true, false, yes, no, on or off"),
    "STEERLLM_UDS_MODE": ("777", "'777' is not one of 600, 660, 666"),
    "STEERLLM_LOG_LEVEL": ("loud", "'loud' is not one of debug, info, warning, error, critical"),
    "STEERLLM_LOG_FORMAT": ("xml", "'xml' is not one of text, json"),
}


def test_every_setting_with_a_rule_is_a_variable() -> None:
    assert {f"STEERLLM_{name.upper()}" for name in (*NUMBERS, *WORDS, *GIB)} <= set(VARIABLES)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor"}))
def test_a_bad_variable_ends_every_command_before_anything_slow_is_imported(command: str) -> None:
    program = f"""if True:
        import sys
        from steer_service.cli.main import main
        print(main([{command!r}, "--help"]), sorted({{"numpy", "grpc", "torch", "vllm", "asyncio"}} & set(sys.modules)))
    """
    environment = {**os.environ, "STEERLLM_GRACE_S": "abc"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2 []\n", "steer: STEERLLM_GRACE_S: 'abc' is not a number\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--grace", "5"]], ids=" ".join)
@pytest.mark.parametrize("variable", BAD_VARIABLES)
def test_a_bad_variable_is_one_sentence(
    variable: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value, message = BAD_VARIABLES[variable]
    monkeypatch.setenv(variable, value)

    assert main(["serve", *arguments]) == BAD_USAGE
    assert capsys.readouterr().err == f"steer: {variable}: {message}\n"


def command_line(*flags: str, **settings: object) -> argparse.Namespace:
    """The flags of `steer serve` that are the server's own."""
    parser = argparse.ArgumentParser()
    add_own_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args(flags)), **settings})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grace", "-1"], "--grace: -1.0 is outside 0..1000000 seconds"),
        (
            ["--instance", "a/b"],
            "--instance: 'a/b' is not 1..128 characters of A-Z a-z 0-9 . _ : [ ] -, such as 10.0.0.3:50051",
        ),
        (
            ["--trusted-proxy", "envoy"],
            "--trusted-proxy: 'envoy' is not `loopback`, `unix`, an address or a network such as 10.0.0.0/24, or `certificate:NAME`",  # noqa: E501
        ),
        (["--uds-mode", "777"], "--uds-mode: '777' is not one of 600, 660, 666"),
        (["--uds-group", "nosuchgroup"], "--uds-group: there is no group 'nosuchgroup'"),
        (["--health-address", "8086"], "--health-address: '8086' is neither host:port nor unix:/path (BAD_ADDRESS)"),
        (["--metrics-port", "70000"], "--metrics-port: 70000 is outside 0..65535"),
        (["--metrics-port", "-1"], "--metrics-port: -1 is outside 0..65535"),
        (["--max-message-bytes", "0"], "--max-message-bytes: 0 is outside 1..2147483647"),
        (
            ["--port", "65536"],
            "--host, --port, --uds: '127.0.0.1:65536' is neither host:port nor unix:/path (BAD_ADDRESS)",
        ),
        (["--port", "-1"], "--host, --port, --uds: '127.0.0.1:-1' is neither host:port nor unix:/path (BAD_ADDRESS)"),
        (["--host", ""], "--host, --port, --uds: ':50051' is neither host:port nor unix:/path (BAD_ADDRESS)"),
        (["--shm-dir", "/no/such/folder"], "--shm-dir: '/no/such/folder' is not a directory"),
        (["--shm-mode", "999"], "--shm-mode: '999' is not a number in octal"),
        (["--shm-mode", "777"], "--shm-mode: '777' is not one of 600, 640 and 644"),
        (["--shm-group", "no such group"], "--shm-group: there is no group 'no such group'"),
    ],
    ids=str,
)
def test_a_bad_flag_is_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command_line(*flags)) == BAD_USAGE
    assert capsys.readouterr() == ("", f"steer: {message}\n")


def test_a_bad_address_of_the_environment_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERLLM_ADDRESS", "nonsense")

    assert run(command_line()) == BAD_USAGE
    assert (
        capsys.readouterr().err
        == "steer: STEERLLM_ADDRESS: 'nonsense' is neither host:port nor unix:/path (BAD_ADDRESS)\n"
    )


@pytest.mark.parametrize("command", [["generate", "hi"], ["info"], ["render", "hi"], ["healthcheck"]], ids=" ".join)
def test_a_client_names_the_variable_of_a_bad_address(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERLLM_ADDRESS", "nonsense")

    assert main(command) == BAD_USAGE
    assert capsys.readouterr().err == "steer: STEERLLM_ADDRESS: 'nonsense' has no port; write host:port\n"
    assert main([*command, "--address", "other"]) == BAD_USAGE
    assert capsys.readouterr().err == "steer: address: 'other' has no port; write host:port\n"
