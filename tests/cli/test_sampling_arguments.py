"""Every sampling option has a flag, whose errors name it."""

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest

from steer_service.cli import generate
from steer_service.cli.main import main
from steer_service.cli.sampling_arguments import SAMPLING, flag_of
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.structured_outputs import StructuredOutputs
from tests.client.conftest import Server

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"

GIVEN: dict[str, tuple[list[str], object]] = {
    "n": (["--n", "3"], 3),
    "max_tokens": (["--max-tokens", "9"], 9),
    "min_tokens": (["--min-tokens", "2"], 2),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_p": (["--top-p", "0.9"], 0.9),
    "top_k": (["--top-k", "40"], 40),
    "min_p": (["--min-p", "0.1"], 0.1),
    "seed": (["--seed", "-7"], -7),
    "presence_penalty": (["--presence-penalty", "-1.5"], -1.5),
    "frequency_penalty": (["--frequency-penalty", "1.5"], 1.5),
    "repetition_penalty": (["--repetition-penalty", "1.2"], 1.2),
    "ignore_eos": (["--ignore-eos"], True),
    "skip_special_tokens": (["--no-skip-special-tokens"], False),
    "logprobs": (["--logprobs", "2", "--json"], 2),
    "prompt_logprobs": (["--prompt-logprobs", "0", "--json"], 0),
    "stop": (["--stop", "\n", "--stop", "END"], ("\n", "END")),
    "stop_token_ids": (["--stop-token-ids", "17,42"], (17, 42)),
    "include_stop": (["--include-stop"], True),
    "logit_bias": (["--logit-bias", "17=-5.5,42=3"], {17: -5.5, 42: 3.0}),
    "bad_words": (["--bad-words", "sea", "--bad-words", "harbour"], ("sea", "harbour")),
    "allowed_token_ids": (["--allowed-token-ids", "17,42"], (17, 42)),
    "structured_outputs": (["--structured-outputs", '{"choice": ["a", "b"]}'], StructuredOutputs(choice=("a", "b"))),
}


def options(*arguments: str) -> SamplingOptions:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return generate.request_from(parser.parse_args(["p", *arguments])).sampling


def test_every_field_has_a_flag() -> None:
    names = [field.name for field in fields(SamplingOptions)]
    assert sorted(SAMPLING) == sorted(names)
    assert sorted(GIVEN) == sorted(names)


def test_without_flags_every_option_is_the_servers() -> None:
    assert options() == SamplingOptions()


@pytest.mark.parametrize("field", GIVEN)
def test_a_flag_gives_its_field_alone(field: str) -> None:
    arguments, value = GIVEN[field]
    assert options(*arguments) == SamplingOptions(**{field: value})


@pytest.mark.parametrize("field", SAMPLING)
def test_every_flag_is_documented(field: str) -> None:
    assert flag_of(field) in re.findall(r"--[a-z][a-z-]*", PAGE.read_text().replace("--[no-]", "--"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "2"], "--top-p: 2.0 is outside"),
        (["--top-p", "much"], "argument --top-p: invalid float value: 'much'"),
        (["--n", "99"], "--n: 99 is outside 1..8"),
        (["--temperature=-1"], "--temperature: -1.0 is outside"),
        (["--min-tokens", "5", "--max-tokens", "4"], "--min-tokens: min_tokens 5 is greater than max_tokens 4"),
        (["--stop", ""], "--stop[0]: the string has 0 characters"),
        (["--stop-token-ids", "17;42"], "--stop-token-ids: '17;42' is not a list of token ids such as 17,42"),
        (["--logit-bias", "17"], "--logit-bias: '17' is not a token id and its bias, such as 17=-5.5"),
        (["--logit-bias", "17=101"], "--logit-bias[17]: bias 101.0 is outside -100..100"),
        (["--structured-outputs", '{"regex": ""}'], "--structured-outputs.regex: "),
        (["--time-budget", "0"], "--time-budget: "),
        (["--timeout", "0"], "--timeout: 0.0 is not above 0"),
        (["--stream-interval=-1"], "--stream-interval: -1 is not"),
        (["--n", "2", "--capture", "1", "--out", "x.npz"], "--n: --capture writes the rows of one output"),
    ],
    ids=lambda given: "" if isinstance(given, str) else " ".join(given),
)
def test_an_error_names_the_flag(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["generate", "p", "--address", "127.0.0.1:1", *arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_an_error_that_the_server_finds_names_the_flag(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "p", "--address", server.address, "--json", "--logprobs", "9999"]) == 1
    assert capsys.readouterr().err.startswith("steer: --logprobs: ")
