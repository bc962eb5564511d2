"""The flags of `steer serve` beside those of vLLM: none hides another, and the help shows ours first."""

import argparse

import pytest

from steer_service.cli.main import main
from steer_service.cli.serve import add_arguments, add_own_arguments


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions)


def test_the_whole_command_line_has_every_flag_of_the_short_help_and_of_vllm() -> None:
    ours, whole = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_own_arguments(ours)
    add_arguments(whole)
    assert flags_of(ours) <= flags_of(whole)
    assert {"--max-model-len", "--dtype", "--tensor-parallel-size"} <= flags_of(whole)
    assert whole.parse_args([]).server_log_level is None


def test_no_flag_of_vllm_is_read_as_an_abbreviation_of_ours() -> None:
    ours, whole = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_own_arguments(ours)
    add_arguments(whole)
    vllms = flags_of(whole) - flags_of(ours)
    assert not [(flag, own) for flag in vllms for own in flags_of(ours) if own.startswith(flag)]


def test_the_whole_help_shows_our_flags_before_vllms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["serve", "--help-all"])
    text = capsys.readouterr().out
    assert exited.value.code == 0
    positions = [text.index(f"\n  {flag}") for flag in ("--host", "--steer-slots", "--max-model-len")]
    assert positions == sorted(positions)
