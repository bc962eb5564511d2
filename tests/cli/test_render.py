"""`steer render` as a user meets it."""

import argparse
import json

import pytest

from steer_service.cli import render
from steer_service.cli.exit_status import FAILED
from steer_service.core.capture import MessageBoundary
from steer_service.core.prompt_tokens import PromptTokens
from tests.client.conftest import Server

MESSAGES = {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "Well,"}]}


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser("steer render")
    render.add_arguments(parser)
    return render.run(parser.parse_args([str(argument) for argument in arguments]))


def test_each_token_has_a_line_with_its_position_place_and_text(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("one  two", "--address", server.address) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[2], line[-1]) for line in lines] == [("0", "0-3", '"one"'), ("1", "5-8", '"two"')]


def test_a_line_of_a_prompt_file_is_a_whole_chat(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(json.dumps(MESSAGES), "--line", "--json", "--address", server.address) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["text"], shown["prefill"]) == ("<user> one two <assistant> Well,", "Well,")
    assert [boundary["role"] for boundary in shown["message_boundaries"]] == ["user", "assistant"]


def test_a_prompt_may_be_sent_as_a_users_message(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("one", "--chat", "--address", server.address) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[3:] == ["0", "user", '"one"']


def test_a_prompt_that_is_too_long_names_the_flag_that_cuts_it(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("a " * 5000, "--address", server.address) == FAILED
    assert "shorten it, or give --truncate-prompt-tokens -1" in capsys.readouterr().err


def test_messages_and_special_tokens_are_marked() -> None:
    tokens = PromptTokens(
        text="<s>a\nb",
        token_ids=(1, 2, 3),
        token_texts=("<s>", "a\n", "b"),
        special_positions=(0,),
        message_boundaries=(MessageBoundary("user", "a", 0, 2),),
    )
    assert list(render.lines_of(tokens)) == [
        '     0       1           -  0 user * "<s>"',
        '     1       2           -  0 user   "a\\n"',
        '     2       3           -  -        "b"',
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--line"), "prompt: not JSON"),
        (('"a"', "--line", "--chat"), "--chat is for a text"),
        (('{"text": "a", "tools": []}', "--line"), "prompt.tools"),
        (("a", "--chat-template-kwargs", "{}"), "--chat-template-kwargs needs --chat or --line"),
        (("",), "the prompt is empty"),
        (("a", "--address", "x"), "has no port"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_an_error_of_the_server_is_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("a", "--model", "other", "--address", server.address) == 1
    assert capsys.readouterr().err.startswith("steer: model: model 'other' is not served here")
