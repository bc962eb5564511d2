"""The sampling defaults of a generation config."""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.sampling_options import DEFAULTS, OUR_DEFAULTS, SamplingDefaults
from steer_service.engine.config import add_engine_arguments, engine_args_for, engine_arguments_from
from steer_service.engine.generation_config import sampling_defaults
from steer_service.testing.fake_backend import FAKE_MODEL


def config_with(**given: float) -> SimpleNamespace:
    return SimpleNamespace(get_diff_sampling_param=lambda: given)


@pytest.mark.parametrize("asked", [None, "vllm"])
def test_without_a_generation_config_the_defaults_are_those_of_the_contract(asked: str | None) -> None:
    assert sampling_defaults(config_with(temperature=0.5), asked, FAKE_MODEL) is OUR_DEFAULTS


@pytest.mark.parametrize(("asked", "source"), [("auto", "model"), ("a/folder", "file")])
def test_a_generation_config_changes_the_defaults_that_it_names(asked: str, source: str) -> None:
    defaults = sampling_defaults(config_with(temperature=0.5, top_k=20, max_tokens=99), asked, FAKE_MODEL)

    assert defaults == SamplingDefaults(
        options=replace(DEFAULTS, temperature=0.5, top_k=20, max_tokens=99), source=source
    )


@pytest.mark.parametrize(("name", "value"), [("temperature", 3.0), ("top_p", 0.0)])
def test_a_generation_config_that_no_request_could_have_is_refused(name: str, value: float) -> None:
    info = replace(FAKE_MODEL, max_temperature=2.0)
    with pytest.raises(InvalidRequest) as refused:
        sampling_defaults(config_with(**{name: value}), "auto", info)
    assert refused.value.field == f"generation_config.{name}"


def test_the_flag_is_known_from_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    not_given, given = (
        engine_arguments_from(parser.parse_args(line)) for line in ([], ["--generation-config", "auto"])
    )

    assert (not_given["generation_config"], given["generation_config"]) == (None, "auto")
    assert engine_args_for("m", not_given).generation_config == engine_args_for("m", given).generation_config == "auto"
