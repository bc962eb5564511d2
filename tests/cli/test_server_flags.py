"""Every setting of the server has a flag, a variable and a row in docs/configuration.md."""

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest

from steer_service.cli.main import main
from steer_service.cli.serve import add_own_arguments
from steer_service.cli.server_flags import config_from, set_engine_variables
from steer_service.core.environment import PREFIX, VARIABLES
from steer_service.core.setting_rules import MOST_SECONDS, NUMBERS
from steer_service.server.config import ServerConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

ADDRESS_FLAGS = {"--host", "--port", "--uds"}

OTHER_NAMES = {"shared_memory": "--no-shared-memory", "capture_metadata": "--no-capture-metadata"}

ENGINES = ("max_shm_gb", "client_shm_gb", "capture_metadata")
"""Settings that the engine reads from the environment."""

SETTINGS = (*(field.name for field in fields(ServerConfig)), *ENGINES)

VALUES = {
    "uds_mode": "660",
    "prefix_isolation": "client",
    "log_level": "debug",
    "log_format": "json",
    "instance": "10.0.0.3:50051",
    "trusted_proxy": "unix",
    "objectives": "chat=1",
    "shm_mode": "644",
    "health_address": "unix:/h",
    "shm_dir": "/dev/shm",
    "token_file": "tokens.toml",
    "tls_cert": "a.pem",
    "tls_key": "b.pem",
    "tls_client_ca": "c.pem",
    "metrics_host": "0.0.0.0",
    "otlp_traces_endpoint": "collector:4317",
    "uds_group": "0",
    "shm_group": "0",
}
"""Setting -> a valid value that is not the default, where that is not the number 7."""

SWITCHES = ("listen_when_ready", "insecure", "shared_memory")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_own_arguments(made)
    return made


def flags_of(setting: str) -> set[str]:
    if setting == "address":
        return ADDRESS_FLAGS
    return {OTHER_NAMES.get(setting, "--" + setting.removesuffix("_s").replace("_", "-"))}


def given(setting: str) -> list[str]:
    [flag] = flags_of(setting)
    return [flag] if setting in SWITCHES else [f"{flag}={VALUES.get(setting, 7)}"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_has_a_flag_a_variable_and_a_row(setting: str) -> None:
    variable = PREFIX + setting.upper()
    assert flags_of(setting) <= set(parser()._option_string_actions)
    assert variable in VARIABLES
    cells = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.startswith("| `--")]
    [flags] = [flags for flags, variables in cells if f"`{variable}`" in variables]
    assert {f"`{flag}`" for flag in flags_of(setting)} <= set(re.findall(r"`[^`]+`", flags))


def test_the_page_has_the_default_of_each_setting() -> None:
    rows = [[cell.strip(" `") for cell in line.split(" | ")] for line in PAGE.read_text().splitlines()]
    shown = {cells[1]: cells[2] for cells in rows if len(cells) == 4 and cells[1].startswith(PREFIX)}
    for field in fields(ServerConfig):
        text = shown.get(PREFIX + field.name.upper(), "")
        if field.name == "instance":
            assert text == "random"
        elif field.name.startswith("tls_") or field.name in ("uds_mode", "uds_group", "shm_group"):
            continue  # rows of two variables, and a default in words
        elif text.endswith(" MiB"):
            assert int(text.removesuffix(" MiB")) << 20 == field.default
        else:
            assert text == (field.default if isinstance(field.default, str) else f"{field.default:.10g}"), field.name


def test_the_page_has_the_ranges_of_numbers() -> None:
    begins_at_1 = {name for name, rule in NUMBERS.items() if rule.least == 1}
    [values] = re.findall(r"^\*\*Values\.\*\*(.*?)\n\n", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", values)) == begins_at_1
    assert {rule.least for rule in NUMBERS.values()} == {0, 1}
    assert f"{MOST_SECONDS:,}" in values
    assert f"{NUMBERS['metrics_port'].most}" in values


def test_the_value_of_each_flag_arrives_in_the_settings() -> None:
    names = [name for name in SETTINGS if name not in (*ENGINES, "address")]
    line = [word for name in names for word in given(name)]
    config = config_from(parser().parse_args([*line, "--port", "7"]))

    assert config.address == "127.0.0.1:7"
    for name in names:
        expected = name != "shared_memory" if name in SWITCHES else VALUES.get(name, "7")
        value = getattr(config, name)
        assert type(value)(expected) == value
        if name != "shm_dir":
            assert value != getattr(ServerConfig(), name)


def test_without_flags_the_settings_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLLM_HEARTBEAT_S", "3")
    monkeypatch.setenv("STEERLLM_ADDRESS", "unix:/x")
    assert config_from(parser().parse_args([])) == ServerConfig(heartbeat_s=3.0, address="unix:/x")
    assert config_from(parser().parse_args(["--heartbeat", "4"])).heartbeat_s == 4.0


def test_the_flags_of_capture_memory_reach_the_engine_as_variables() -> None:
    variables: dict[str, str] = {}
    line = ["--max-shm-gb", "2", "--client-shm-gb", "0.5", "--no-capture-metadata"]
    set_engine_variables(parser().parse_args(line), variables)
    assert variables == {
        "STEERLLM_MAX_SHM_GB": "2.0",
        "STEERLLM_CLIENT_SHM_GB": "0.5",
        "STEERLLM_CAPTURE_METADATA": "0",
    }
    set_engine_variables(parser().parse_args([]), kept := dict(variables))
    assert kept == variables


def test_capture_memory_that_is_no_positive_number_is_refused_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parser().parse_args(["--max-shm-gb", "0"])
    assert exited.value.code == 2
    assert "argument --max-shm-gb: '0' is not a positive number of GiB" in capsys.readouterr().err


def test_a_bad_variable_that_only_a_server_can_check_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steer_service.cli.serve import run

    monkeypatch.setenv("STEERLLM_SHM_DIR", "/no/such/folder")
    assert run(parser().parse_args([])) == 2
    assert capsys.readouterr().err == "steer: STEERLLM_SHM_DIR: '/no/such/folder' is not a directory\n"


def test_the_help_of_serve_is_ours_and_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exited:
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert exited.value.code == 0
    assert len(text.splitlines()) <= 110
    assert "--help-all" in text
    assert "--tensor-parallel-size N" not in text
    for setting in SETTINGS:
        assert all(flag in text for flag in flags_of(setting))
