"""Every class in the table of layer outputs, on a tiny random model of its family, against HuggingFace in float64.

The usual run has one family of each kind; the others are marked `extended`, and docs/models.md has the last result.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_service.core.errors import Unsupported
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.core.verified_architectures import VERIFIED_ARCHITECTURES
from steer_service.engine.config import SteeringConfig
from steer_service.engine.worker.layer_outputs import LAYER_OUTPUTS, decoder_layers, final_norm
from tests.engine.families import EVERY_TIME, FAMILIES, LAYER_CLASSES, LAYERS, WIDTH, architecture_of, write_family
from tests.engine.family_variants import VARIANT_CLASSES, VARIANTS, VARIANTS_EVERY_TIME
from tests.engine.in_process import Ask, in_process
from tests.engine.multimodal import MULTIMODAL
from tests.engine.oracle import Oracle, relative_error

TOLERANCE = 1e-5
"""Largest distance of a row from the oracle's, over its norm."""

TOKENS = 8


def direction(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=WIDTH)


ADD = AddSpec(direction(1), 2.0)
CAP = ProjectionCapSpec(direction(2), min=-0.1, max=0.3)
ABLATE = AblationSpec(direction(3), -0.5)

STEERING = SteeringSpec(layers={1: LayerSteeringSpec([ADD, CAP, ABLATE]), 3: LayerSteeringSpec([ABLATE, ADD, CAP])})

ASKS = [
    Ask(prompt=[(37 * index + 11 * step) % 500 + 3 for step in range(length)], tokens=TOKENS, steering=steering)
    for index, (length, steering) in enumerate([(5, None), (35, STEERING), (65, None), (3, STEERING)])
]
"""One batch: prompts of one step and of several, steered and not."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def folder_of(root: Path, name: str) -> Path:
    if not (root / name).exists():
        write_family(FAMILIES[name], root / name, name)
    return root / name


def class_of(layer: object) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def check(root: Path, name: str, **arguments: Any) -> set[str]:
    """Compares every row of every layer with the oracle; returns the classes of the layers."""
    folder = folder_of(root, name)
    return compare(folder, Oracle(folder, FAMILIES[name].mend), **arguments)


def compare(folder: Path, oracle: Oracle, *, has_final_norm: bool = True, **arguments: Any) -> set[str]:
    """Compares every row of every layer of the model in `folder`; returns the classes of the layers."""
    with in_process(folder, **arguments) as engine:
        answers = engine.run(ASKS)
        model = engine.worker.model_runner.get_model()
        classes = {class_of(layer) for layer in decoder_layers(model)}
        assert (final_norm(model) is not None) == has_final_norm
    for ask, answer in zip(ASKS, answers, strict=True):
        want = oracle.streams(answer.token_ids[:-1], ask.steering)
        errors = [relative_error(answer.streams[layer], want[layer]) for layer in range(LAYERS)]
        assert max(errors) <= TOLERANCE, errors
    return classes


@pytest.mark.engine
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.extended) for name in LAYER_CLASSES]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # transformers' GPT BigCode
def test_streams_of_a_family_equal_huggingface(name: str, root: Path) -> None:
    assert check(root, name) == {LAYER_CLASSES[name]}


def test_every_class_in_the_table_is_proven_by_a_family() -> None:
    classes = {*LAYER_CLASSES.values(), *VARIANT_CLASSES.values(), *(kind.layer_class for kind in MULTIMODAL.values())}
    assert set(LAYER_OUTPUTS) == classes


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # transformers' GPT BigCode
def test_the_architectures_that_are_known_by_name_are_those_that_a_family_proves() -> None:
    assert {
        *(architecture_of(FAMILIES[name], name) for name in LAYER_CLASSES),
        *(architecture_of(VARIANTS[name]) for name in VARIANT_CLASSES),
        *MULTIMODAL,
    } == VERIFIED_ARCHITECTURES


PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def section(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of docs/models.md."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][1:]


def test_the_page_has_every_class_of_layers_with_its_convention() -> None:
    expected = {
        (name.rpartition(".")[2], name.startswith("transformers."), str(output))
        for name, output in LAYER_OUTPUTS.items()
    }
    assert {
        (cells[1].split("`")[1], "(transformers)" in cells[1], cells[2].strip("`")) for cells in section("Proven")
    } == expected


def test_the_page_marks_the_families_of_every_test_run() -> None:
    marked = {name for cells in section("Proven") for name in re.findall(r"\*\*(\w+)\*\*", cells[0])}
    assert marked == {*EVERY_TIME, *VARIANTS_EVERY_TIME}


def test_the_page_has_every_architecture_that_also_sees() -> None:
    assert {cells[0].split("`")[1] for cells in section("Multimodal models")} == set(MULTIMODAL)


def test_the_nine_families_that_must_be_served_are_tested_every_time() -> None:
    assert {"qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma2", "gemma3", "phi3", "gpt2"} <= EVERY_TIME


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("name", ["gpt2", "cohere"])
def test_layer_outputs_other_than_llamas_hold_when_compiled(name: str, root: Path) -> None:
    check(root, name, enforce_eager=False)


@pytest.mark.engine
def test_a_model_outside_the_table_is_refused_unless_the_user_says_what_its_layers_return(root: Path) -> None:
    """The same Llama through transformers' own layers, which return one tensor."""
    folder = folder_of(root, "llama")
    with in_process(folder, model_impl="transformers") as engine:
        assert engine.report.refusal_reason == "UNVERIFIED_ARCHITECTURE"
        with pytest.raises(Unsupported, match=r"LlamaDecoderLayer.*--steer-allow-unverified"):
            engine.run(ASKS)
    with in_process(
        folder, steering=SteeringConfig(allow_unverified="hidden_and_residual"), model_impl="transformers"
    ) as engine:
        assert engine.report.refusal_reason == "TAP_SELF_TEST_FAILED"
    check(root, "llama", steering=SteeringConfig(slots=8, allow_unverified="one_tensor"), model_impl="transformers")
