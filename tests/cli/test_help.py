"""The help of the commands says what their documents, lines and folders have."""

import pytest

from steer_service.cli import generate, train
from steer_service.cli.capture import command as capture
from steer_service.formats import spec_json
from steer_service.runtime.chat_lines import CHAT_KEYS, TEXT_KEYS


def test_the_help_on_a_steering_document_names_everything_that_it_may_have() -> None:
    operation = {"op", "vector", "scaling", *spec_json._OPTIONS}.union(*spec_json.NUMBERS.values())
    for name in operation | {"layers", "positions", "report_change", "hook", "operations"}:
        assert f'"{name}"' in generate.DESCRIPTION


@pytest.mark.parametrize("command", [capture, train], ids=["capture", "train"])
def test_the_help_on_lines_of_prompts_names_every_key(command: object) -> None:
    for key in (*CHAT_KEYS, *TEXT_KEYS):
        assert f'"{key}"' in command.DESCRIPTION


def test_the_help_on_captures_names_what_lines_and_manifest_have() -> None:
    for key in ("id", "messages", "start", "end", "messages_missing_reason", "special_token_ids"):
        assert f'"{key}"' in capture.DESCRIPTION
