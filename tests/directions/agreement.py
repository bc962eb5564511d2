"""What another backend answers, against the model in this process: rows for directions, and how likely targets are."""

import numpy as np

from steer_service.core.prompt import TextPrompt
from steer_service.core.specs import SteeringSpec
from steer_service.directions.rows import RowChoice, collect_rows
from steer_service.directions.sweep import target_log_probabilities
from steer_service.directions.training import log_probabilities
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.calls import SteeringCalls
from tests.directions.test_rows import chat
from tests.directions.test_training import TARGETS
from tests.tiny_models import WIDTH

STEERINGS = [None, SteeringSpec.simple_add(2, np.ones(WIDTH), 2.0)]
LAYERS = (0, 3)
CHOICES = (*RowChoice, -2)
OF_CHATS = (RowChoice.LAST_MESSAGE, -2)
"""Choices that are compared on chats, whose answers are given."""


async def assert_rows_agree(hf: HFSteeringModel, other: SteeringCalls, choice: RowChoice | int) -> None:
    texts = [TextPrompt(text=text) for text in ("The cat sat down.", "A dog barked.")]
    prompts = [chat(text.text, continue_final_message=True) for text in texts] if choice in OF_CHATS else texts
    here, there = [await collect_rows(model, prompts, LAYERS, choice) for model in (hf, other)]
    for layer in LAYERS:
        np.testing.assert_allclose(there[layer], here[layer], rtol=1e-4, atol=1e-4)


async def assert_targets_agree(
    hf: HFSteeringModel, other: SteeringCalls, steering: SteeringSpec | None, *, atol: float
) -> None:
    there = await target_log_probabilities(other, TARGETS, steering)
    np.testing.assert_allclose(there, log_probabilities(hf, TARGETS, steering), atol=atol)
