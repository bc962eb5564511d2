"""Training towards targets, and how likely a model finds them, on the tiny Llama."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt
from steer_service.core.specs import AblationSpec, LayerSteeringSpec, SteeringSpec
from steer_service.directions.targets import Target
from steer_service.directions.training import log_probabilities, target_tokens, train
from steer_service.hf.model import HFSteeringModel
from tests.engine.oracle import Oracle
from tests.tiny_models import WIDTH, ModelFolder

TARGETS = [
    Target(prompt=TextPrompt(text="The cat"), text=" sat down."),
    Target(prompt=TextPrompt(text="A"), text=" dog barks at the moon all night."),
    Target(prompt=ChatPrompt(messages=(ChatMessage(role="user", content="Hi"),)), text="Hello, you."),
]
ABLATE = SteeringSpec({1: LayerSteeringSpec([AblationSpec(np.arange(1, WIDTH + 1), -1.0)])})


@pytest.fixture
def trainable(model_folder: ModelFolder) -> Iterator[HFSteeringModel]:
    with HFSteeringModel(model_folder("llama"), target_layers=[1, 2], dtype=torch.float32) as model:
        yield model


@pytest.fixture(scope="module")
def oracle(model_folder: ModelFolder) -> Oracle:
    return Oracle(model_folder("llama"))


@pytest.mark.parametrize("steering", [None, ABLATE, SteeringSpec.simple_add(2, np.ones(WIDTH), 0.3)])
def test_log_probabilities_of_a_padded_batch_are_the_oracles(
    hf: HFSteeringModel, oracle: Oracle, steering: SteeringSpec | None
) -> None:
    tokens = target_tokens(hf, TARGETS)
    want = [np.mean(oracle.logprobs([*one.prompt, *one.target], steering, len(one.prompt))) for one in tokens]
    np.testing.assert_allclose(log_probabilities(hf, TARGETS, steering), want, atol=1e-5)
    np.testing.assert_allclose(log_probabilities(hf, TARGETS, steering, batch_size=1), want, atol=1e-5)


def test_training_makes_targets_likelier_and_the_spec_does_the_same(trainable: HFSteeringModel) -> None:
    before = log_probabilities(trainable, TARGETS)
    losses = train(trainable, TARGETS, epochs=20, batch_size=3)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_array_equal(log_probabilities(trainable, TARGETS), before)  # of the model alone
    assert (log_probabilities(trainable, TARGETS, trainable.to_spec()) > before).all()


def test_the_loss_is_of_the_targets_tokens_alone(trainable: HFSteeringModel) -> None:
    (loss,) = train(trainable, TARGETS, epochs=1, batch_size=3)
    counts = [len(one.target) for one in target_tokens(trainable, TARGETS)]
    mean = np.average(log_probabilities(trainable, TARGETS), weights=counts)
    assert loss == pytest.approx(-mean, abs=1e-5)


def test_the_same_seed_trains_alike_and_the_base_stays_as_it_was(
    model_folder: ModelFolder, trainable: HFSteeringModel
) -> None:
    base = {name: weight.clone() for name, weight in trainable.model.state_dict().items()}
    losses = train(trainable, TARGETS, epochs=3, batch_size=2, seed=7)
    assert len(losses) == 6
    with HFSteeringModel(model_folder("llama"), target_layers=[1, 2], dtype=torch.float32) as other:
        assert train(other, TARGETS, epochs=3, batch_size=2, seed=7) == pytest.approx(losses, abs=1e-5)
    for name, weight in trainable.model.state_dict().items():
        assert torch.equal(weight, base[name])


def test_what_cannot_be_trained_is_refused(hf: HFSteeringModel, trainable: HFSteeringModel) -> None:
    with pytest.raises(InvalidRequest) as refused:
        train(hf, TARGETS)
    assert refused.value.reason == "NO_TARGET_LAYERS"
    with pytest.raises(InvalidRequest) as refused:
        train(trainable, [])
    assert refused.value.reason == "NO_TARGETS"
    long = Target(prompt=TextPrompt(text="a"), text=" word" * 2000)
    with pytest.raises(InvalidRequest) as refused:
        train(trainable, [*TARGETS, long])
    assert (refused.value.field, refused.value.reason) == ("targets[3]", "BAD_TARGET")
    for layer in trainable.target_layers:
        trainable.set_steering_vector(layer, np.full(WIDTH, 3e38))  # finite, unlike the sum of two
    with pytest.raises(InvalidRequest) as refused:
        train(trainable, TARGETS)
    assert refused.value.field == "learning_rate"


def test_log_probabilities_refuse_a_spec_that_does_not_fit(hf: HFSteeringModel) -> None:
    with pytest.raises(InvalidRequest) as refused:
        log_probabilities(hf, TARGETS, SteeringSpec.simple_add(9, np.ones(WIDTH)))
    assert refused.value.field == "steering.layers[9]"
    with pytest.raises(Unsupported) as unsupported:
        log_probabilities(hf, TARGETS, SteeringSpec.simple_add(1, np.ones(WIDTH), positions="prompt"))
    assert unsupported.value.field == "steering.positions"
