"""What is captured of a bfloat16 model through transformers keeps the contract, and what else it might be does not."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.hf import HFSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Output, collect
from tests.ops.captured import check_captured
from tests.placed import placed
from tests.tiny_models import LAYERS, WIDTH, ModelFolder

PROMPT, TOKENS = tuple(range(500, 509)), 4
VECTORS = np.random.default_rng(0).normal(size=(3, WIDTH))
OPERATIONS = (AddSpec(VECTORS[0]), ProjectionCapSpec(VECTORS[1], min=-0.1, max=0.3), AblationSpec(VECTORS[2], -0.5))


def spec_of(*operations: object, positions: object = None) -> SteeringSpec:
    return SteeringSpec({layer: LayerSteeringSpec(operations) for layer in (1, 2)}, positions=positions)


@pytest.fixture(scope="module")
def model(model_folder: ModelFolder) -> Iterator[HFSteeringModel]:
    with HFSteeringModel(model_folder("llama"), dtype=torch.bfloat16) as model:
        yield model


async def captured(model: HFSteeringModel, steering: SteeringSpec | None) -> Output:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=PROMPT),
        sampling=SamplingOptions(max_tokens=TOKENS, temperature=0.0, ignore_eos=True),
        steering=steering,
        capture=CaptureSpec(layers=range(LAYERS), site=CaptureSite.BOTH, dtype="float32"),
    )
    return (await collect(checked_events(model, request))).outputs[0]


@pytest.mark.parametrize(
    "steering",
    [
        None,
        *(spec_of(operation) for operation in OPERATIONS),
        spec_of(*OPERATIONS),
        spec_of(*OPERATIONS[::-1]),
        spec_of(*OPERATIONS, positions=[-1, "generated"]),
        spec_of(replace(OPERATIONS[0], positions=-1), replace(OPERATIONS[1], positions="generated"), OPERATIONS[2]),
        spec_of(replace(OPERATIONS[1], positions=[0, 2]), OPERATIONS[0], positions="generated"),
    ],
)
async def test_rows_of_a_bfloat16_model_keep_the_contract(model: HFSteeringModel, steering: SteeringSpec | None):
    numbered = placed(steering, PromptPlaces(token_ids=PROMPT), len(PROMPT) + TOKENS - 1)
    assert check_captured(await captured(model, steering), numbered, "bfloat16") <= 1.0


async def test_rows_with_other_steering_break_the_contract(model: HFSteeringModel) -> None:
    output = await captured(model, spec_of(*OPERATIONS))

    with pytest.raises(AssertionError, match="of the tolerance"):
        check_captured(output, spec_of(*OPERATIONS[::-1]), "bfloat16")
    with pytest.raises(AssertionError, match="layer 1"):
        check_captured(output, None, "bfloat16")
    with pytest.raises(AssertionError, match="float16: errors"):
        check_captured(output, spec_of(*OPERATIONS), "float16")
    with pytest.raises(AssertionError, match="layer 1"):
        check_captured(output, spec_of(*(replace(one, positions=[0, 1]) for one in OPERATIONS)), "bfloat16")
