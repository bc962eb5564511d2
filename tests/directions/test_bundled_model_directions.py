"""What directions and training are worth on the bundled model, with happy and sad statements."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from steer_service.directions.contrast import ContrastPair, read_contrast, split_pairs
from steer_service.directions.directions import Method, find_directions
from steer_service.directions.rows import LayerRows, RowChoice, collect_rows
from steer_service.directions.scores import best_score, evaluate_all
from steer_service.directions.targets import targets_of
from steer_service.directions.training import log_probabilities, train
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.hf.model import HFSteeringModel
from tests.directions.test_rows import chat, rendered, states_of

pytestmark = pytest.mark.slow

LAYER = 14
TRAIN, HELD_OUT = split_pairs(read_contrast(Path(__file__).with_name("contrast.jsonl")), held_out=0.5)


@pytest.fixture(scope="module")
def bundled() -> Iterator[HFSteeringModel]:
    with HFSteeringModel(ensure_bundled_model(), target_layers=[LAYER], dtype=torch.float32) as model:
        yield model


async def rows_of(model: HFSteeringModel, pairs: Sequence[ContrastPair]) -> tuple[LayerRows, LayerRows]:
    layers = range(0, model.layer_count, 3)
    positive = await collect_rows(model, [pair.positive for pair in pairs], layers)
    return positive, await collect_rows(model, [pair.negative for pair in pairs], layers)


async def test_directions_part_held_out_prompts_at_their_best_layer(bundled: HFSteeringModel) -> None:
    learned, judged = await rows_of(bundled, TRAIN), await rows_of(bundled, HELD_OUT)
    for method in Method:
        scores = evaluate_all(find_directions(method, *learned), *judged)
        best = best_score(scores, bundled.layer_count)
        assert best.auc >= 0.9
        assert best.accuracy >= 0.9


def test_training_on_20_pairs_raises_the_held_out_targets(bundled: HFSteeringModel) -> None:
    assert len(TRAIN) == 20
    losses = train(bundled, targets_of(TRAIN), epochs=6, batch_size=20, learning_rate=0.1)
    assert losses[-1] < losses[0]
    held_out = targets_of(HELD_OUT)
    before, after = log_probabilities(bundled, held_out), log_probabilities(bundled, held_out, bundled.to_spec())
    assert (after > before).mean() >= 0.9
    opposites = targets_of([ContrastPair(pair.negative, pair.positive) for pair in HELD_OUT])
    rise = log_probabilities(bundled, opposites, bundled.to_spec()) - log_probabilities(bundled, opposites)
    assert np.mean(after - before) > np.mean(rise)


async def test_rows_of_given_answers_are_those_of_transformers(bundled: HFSteeringModel) -> None:
    layer = LAYER - 1  # another test may have trained what acts at LAYER in transformers' own forward pass
    prompt = chat("(A)", continue_final_message=True)
    states, token_ids = await states_of(bundled, rendered(bundled, prompt, continue_final_message=True), layer)
    assert [bundled.tokenizer.decode([one]) for one in token_ids[-3:]] == ["(", "A", ")"]
    choices: dict[RowChoice | int, np.ndarray] = {-2: states[-2], RowChoice.LAST_MESSAGE: states[-3:].mean(0)}
    for choice, want in choices.items():
        [row] = (await collect_rows(bundled, [prompt], [layer], choice))[layer]
        np.testing.assert_allclose(row, want, rtol=1e-3, atol=1e-3 * np.linalg.norm(want) / np.sqrt(want.size))
