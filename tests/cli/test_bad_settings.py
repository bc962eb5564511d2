"""A setting that is not valid is one sentence and the exit status of a wrong command line, before anything starts."""

import argparse

import pytest

from steer_service.cli.exit_status import BAD_USAGE
from steer_service.cli.main import main
from steer_service.cli.serve import SHARED_WITH_ENGINE, run
from steer_service.server.config import ServerConfig

BAD_VARIABLES = {
    "STEERLLM_GRACE_S": ("abc", "'abc' is not a number"),
    "STEERLLM_SHM_TTL": ("-1", "-1.0 is outside 0..1000000 seconds"),
    "STEERLLM_METRICS_PORT": ("65536", "65536 is outside 0..65535"),
    "STEERLLM_MAX_CONCURRENT_REQUESTS": ("0", "0 is outside 1..2147483647"),
    "STEERLLM_SHARED_MEMORY": ("yes", "'yes' is not a number"),
    "STEERLLM_LOG_LEVEL": ("loud", "'loud' is not one of debug, info, warning, error, critical"),
    "STEERLLM_LOG_FORMAT": ("xml", "'xml' is not one of text, json"),
}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--grace", "5"]], ids=" ".join)
@pytest.mark.parametrize("variable", BAD_VARIABLES)
def test_a_bad_variable_is_one_sentence(
    variable: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value, message = BAD_VARIABLES[variable]
    monkeypatch.setenv(variable, value)

    assert main(["serve", *arguments]) == BAD_USAGE
    assert capsys.readouterr().err == f"steer: {variable}: {message}\n"


def command_line(**flags: object) -> argparse.Namespace:
    """The flags of `steer serve` that are the server's own."""
    config = ServerConfig()
    given = {
        "host": None,
        "port": None,
        "uds": None,
        "token_file": config.token_file,
        "tls_cert": config.tls_cert,
        "tls_key": config.tls_key,
        "tls_client_ca": config.tls_client_ca,
        "trusted_proxy": config.trusted_proxy,
        "uds_mode": config.uds_mode,
        "uds_group": config.uds_group,
        "listen_when_ready": config.listen_when_ready,
        "insecure": config.insecure,
        "grace": config.grace_s,
        "max_message_bytes": config.max_message_bytes,
        "max_concurrent_requests": config.max_concurrent_requests,
        "instance": config.instance,
        "health_address": config.health_address,
        "metrics_port": config.metrics_port,
        "metrics_host": config.metrics_host,
        "shared_memory": config.shared_memory,
        "prefix_isolation": config.prefix_isolation,
        "max_restarts": config.max_restarts,
        "restart_window": config.restart_window_s,
        "step_timeout": config.step_timeout_s,
        "otlp_traces_endpoint": None,
        "server_log_level": None,
        "log_format": config.log_format,
        **{f"steer_{name}": getattr(config, name) for name in SHARED_WITH_ENGINE},
    }
    return argparse.Namespace(**{**given, **flags})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"grace": -1.0}, "grace_s: -1.0 is outside 0..1000000 seconds"),
        (
            {"instance": "a/b"},
            "instance: 'a/b' is not 1..128 characters of A-Z a-z 0-9 . _ : [ ] -, such as 10.0.0.3:50051",
        ),
        (
            {"trusted_proxy": "envoy"},
            "trusted_proxy: 'envoy' is not `loopback`, `unix`, an address or a network such as 10.0.0.0/24, or `certificate:NAME`",  # noqa: E501
        ),
        ({"uds_mode": "777"}, "uds_mode: '777' is not one of 600, 660, 666"),
        ({"uds_group": "nosuchgroup"}, "uds_group: there is no group 'nosuchgroup'"),
        ({"health_address": "8086"}, "health_address: '8086' is neither host:port nor unix:/path"),
        ({"metrics_port": 70_000}, "metrics_port: 70000 is outside 0..65535"),
        ({"metrics_port": -1}, "metrics_port: -1 is outside 0..65535"),
        ({"max_message_bytes": 0}, "max_message_bytes: 0 is outside 1..2147483647"),
        ({"port": 65_536}, "address: '127.0.0.1:65536' is neither host:port nor unix:/path"),
        ({"port": -1}, "address: '127.0.0.1:-1' is neither host:port nor unix:/path"),
        ({"host": ""}, "address: ':50051' is neither host:port nor unix:/path"),
        ({"steer_shm_dir": "/no/such/folder"}, "shm_dir: '/no/such/folder' is not a directory"),
        ({"steer_shm_mode": "999"}, "shm_mode: '999' is not a number in octal"),
        ({"steer_shm_mode": "777"}, "shm_mode: '777' is not one of 600, 640 and 644"),
        ({"steer_shm_group": "no such group"}, "shm_group: there is no group 'no such group'"),
    ],
    ids=str,
)
def test_a_bad_flag_is_one_sentence(flags: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command_line(**flags)) == BAD_USAGE
    assert capsys.readouterr() == ("", f"steer: {message}\n")


def test_a_bad_address_of_the_environment_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERLLM_ADDRESS", "nonsense")

    assert run(command_line()) == BAD_USAGE
    assert capsys.readouterr().err == "steer: address: 'nonsense' is neither host:port nor unix:/path\n"
