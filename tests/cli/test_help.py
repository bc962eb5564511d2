"""The help of the commands says what their documents, lines and folders have."""

import argparse

import pytest

from steer_service.cli import generate, train
from steer_service.cli.capture import command as capture
from steer_service.formats import spec_json
from steer_service.runtime.chat_lines import CHAT_KEYS, TEXT_KEYS


def test_the_help_on_a_steering_document_names_everything_that_it_may_have() -> None:
    operation = {"op", "vector", "scaling", *spec_json._OPTIONS}.union(*spec_json.NUMBERS.values())
    for name in operation | {"layers", "positions", "report_change", "hook", "operations"}:
        assert f'"{name}"' in generate.DESCRIPTION


def test_the_help_gives_the_default_of_each_command() -> None:
    """A capture generates nothing by default; a generation leaves the choice to the server."""
    helps = {}
    for command in (capture, generate):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        helps[command] = " ".join(parser.format_help().split())
    assert "most tokens to generate (default: 0)" in helps[capture]
    assert "0 is greedy (default: 1)" in helps[capture]
    assert "the server's" not in helps[capture].partition("sampling:")[2]
    assert "most tokens to generate (default: the server's, usually 256)" in helps[generate]


@pytest.mark.parametrize("command", [capture, train], ids=["capture", "train"])
def test_the_help_on_lines_of_prompts_names_every_key(command: object) -> None:
    for key in (*CHAT_KEYS, *TEXT_KEYS):
        assert f'"{key}"' in command.DESCRIPTION


def test_the_help_on_captures_names_what_lines_and_manifest_have() -> None:
    for key in ("id", "messages", "start", "end", "messages_missing_reason", "special_token_ids"):
        assert f'"{key}"' in capture.DESCRIPTION
