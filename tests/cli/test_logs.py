"""The flags of the server's log, and the events from its start to its end."""

import argparse
import asyncio
import io
import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest

from steer_service.cli.exit_status import FAILED
from steer_service.cli.logs import add_log_arguments, begin_log
from steer_service.cli.serve import run, serve
from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from tests.cli.test_bad_settings import command_line
from tests.cli.test_serve import CONFIG, Lines, started
from tests.server.served import bounded


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    theirs = parser.add_argument_group("as vLLM 0.32 has it")
    theirs.add_argument("--log-level", choices=["INFO"], default=argparse.SUPPRESS)
    add_log_arguments(parser.add_argument_group("server"), ServerConfig(log_format="json"))
    return parser.parse_args(arguments)


def test_our_level_takes_the_place_of_vllms_flag() -> None:
    assert vars(parse("--log-level", "INFO")) == {"server_log_level": "info", "log_format": "json"}
    assert vars(parse("--log-format", "text")) == {"server_log_level": None, "log_format": "text"}


@pytest.mark.parametrize("arguments", [("--log-level", "loud"), ("--log-format", "xml")])
def test_other_values_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert "invalid choice" in capsys.readouterr().err


@contextmanager
def standard_error() -> Iterator[io.StringIO]:
    """That of a process whose log has not begun; the log is as before after the block."""
    root, ours = logging.getLogger(), logging.getLogger("steer_service")
    before, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()
    try:
        with redirect_stderr(io.StringIO()) as stream:
            yield stream
    finally:
        root.handlers[:] = before
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def test_by_default_warnings_are_lines_of_text() -> None:
    with standard_error() as written:
        begin_log(ServerConfig(), None)
        logging.getLogger("steer_service.a").info("not shown")
        logging.getLogger("steer_service.a").warning("shown")
    assert written.getvalue() == "steer: WARNING steer_service.a: shown\n"


def test_a_level_of_the_variable_is_ours_alone() -> None:
    with standard_error() as written:
        begin_log(ServerConfig(log_level="DEBUG"), None)
        logging.getLogger("steer_service.a").debug("shown")
        logging.getLogger("a_library").info("not shown")
    assert written.getvalue() == "steer: DEBUG steer_service.a: shown\n"


async def test_the_life_of_a_server_is_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "steer_service")
    lines = Lines(capfd)
    serving = asyncio.ensure_future(serve(CONFIG, lambda: started(FakeBackend())))
    address = (await lines.until(r"steer: serving \S+ on (\S+)\n"))[1]
    os.kill(os.getpid(), signal.SIGTERM)
    assert await bounded(serving) == 0

    events = {record.event: record.fields for record in caplog.records if record.name.startswith("steer_service")}
    assert [*events] == ["listening", "serving", "stopping", "stopped"]
    assert events["listening"] == {"address": address}
    assert events["serving"] == {"model": "fake", "address": address}


def test_a_start_that_fails_is_a_json_object_where_lines_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def fails() -> Backend:
        raise EngineFailed("vLLM did not start", reason="START_FAILED")

    monkeypatch.setattr("steer_service.cli.serve.EngineStart", lambda *_: fails)
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(tmp_path))  # a user's own configuration stays
    with standard_error() as written:
        assert run(command_line(log_format="json", port=0)) == FAILED
    last = json.loads(written.getvalue().splitlines()[-1])
    assert (last["event"], last["level"], last["reason"]) == ("failed", "critical", "START_FAILED")
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == str(tmp_path)
