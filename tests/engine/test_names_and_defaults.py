"""An engine with several names of its model, and with the sampling defaults of a generation config."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from steer_service.core.errors import InvalidRequest, NotFound
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import DEFAULTS, OUR_DEFAULTS, SamplingDefaults
from steer_service.engine import VLLMSteeringModel
from steer_service.engine.config import add_engine_arguments, engine_args_for, engine_arguments_from
from steer_service.engine.generation_config import sampling_defaults
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import ModelFolder


@pytest.mark.engine
async def test_several_names_and_a_generation_config(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "max_new_tokens": 3, "top_k": 7}))
    arguments = {**ENGINE_ARGUMENTS, "served_model_name": ["mine", "alias", "mine"], "generation_config": "auto"}
    prompt = TokenPrompt(token_ids=(5,))
    with VLLMSteeringModel(str(folder), **arguments) as model:
        assert (model.info.name, model.info.aliases) == ("mine", ("alias",))
        for name in ("", "mine", "alias"):
            await model.complete(GenerateRequest(prompt=prompt, model=name))
        with pytest.raises(NotFound):
            await model.complete(GenerateRequest(prompt=prompt, model="other"))

        [generation], _ = await model.generate([prompt], ignore_eos=True, raw_output=True)
        assert generation.generation_config == "model"
        sampling = generation.sampling
        assert (sampling.temperature, sampling.max_tokens, sampling.top_k) == (0.25, 3, 7)
        [asked], _ = await model.generate([prompt], max_tokens=2, temperature=0.0, raw_output=True)
        assert (asked.sampling.temperature, asked.sampling.max_tokens, asked.sampling.top_k) == (0.0, 2, 7)


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
