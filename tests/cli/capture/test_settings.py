"""The settings of two runs that differ are named by the options that give them."""

import json
from pathlib import Path

import pytest

from steer_service.cli.capture.settings import OPTIONS, SWITCHES, differences, in_words
from tests.cli.capture.command import run, write_lines
from tests.client.conftest import Server

FACTS = {
    "format",
    "version",
    "architecture",
    "layer_count",
    "hidden_size",
    "vocab_size",
    "special_token_ids",
    "layer_convention",
}
"""What no option gives."""
NAMED_BY_THEMSELVES = {"model", "adapter", "dtype", "steering_digest"}


def test_every_field_of_a_manifest_has_its_words(server: Server, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.txt", ["a"])
    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0
    head = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert set(head) == FACTS | NAMED_BY_THEMSELVES | set(OPTIONS) | set(SWITCHES)
    assert differences(head, head) is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("truncate", True, "with --truncate"),
        ("truncate", None, "without --truncate"),
        ("add_special_tokens", False, "with --no-special-tokens"),
        ("add_special_tokens", True, "without --no-special-tokens"),
        ("layers", [5, 7], "with --layers 5,7"),
        ("pooling", None, "without --pooling"),
        ("positions", "-1", "with --positions=-1"),
        ("dtype", "float32", "with rows in float32 (--dtype)"),
        ("steering_digest", "0123456789abcdef", "with the --steering 0123456789ab"),
        ("version", 2, "with version 2"),
        ("special_token_ids", list(range(1000)), "with special_token_ids [0, 1, 2,"),
    ],
)
def test_a_setting_is_said_in_the_words_of_the_command_line(name: str, value: object, words: str) -> None:
    said = in_words(name, value)
    assert said.startswith(words)
    assert name == "special_token_ids" or said == words
    assert len(said) < 100


def test_a_line_of_an_earlier_version_may_lack_a_switch() -> None:
    assert differences({}, {"truncate": True}) == ("without --truncate", "with --truncate")
    assert differences({}, {"truncate": None}) is None
