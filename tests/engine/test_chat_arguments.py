"""The flags of `steer serve` for chats, under the names of vLLM's own server."""

import argparse
import dataclasses
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from steer_service.engine.config import CHAT_ARGUMENTS, add_engine_arguments, engine_arguments_from


def parsed(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return parser.parse_args(line)


def test_a_template_and_its_arguments_reach_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "x.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    arguments = engine_arguments_from(
        parsed("--chat-template", str(file), "--default-chat-template-kwargs", '{"enable_thinking": false}')
    )
    assert arguments["chat_template"] == str(file)
    assert arguments["default_chat_template_kwargs"] == '{"enable_thinking": false}'


def test_without_the_flags_the_engine_is_told_nothing() -> None:
    assert not set(CHAT_ARGUMENTS) & set(engine_arguments_from(parsed()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--chat-template", "nowhere.jinja"), "'nowhere.jinja' is neither a file"),
        (("--default-chat-template-kwargs", "{"), "not a JSON object"),
        (("--default-chat-template-kwargs", '{"tools": []}'), "'tools' is an argument of the renderer"),
    ],
)
def test_a_bad_flag_ends_the_command(line: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*line)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_no_argument_of_vllm_s_engine_has_these_names() -> None:
    assert not set(CHAT_ARGUMENTS) & {field.name for field in dataclasses.fields(AsyncEngineArgs)}
