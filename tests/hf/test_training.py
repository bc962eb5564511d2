"""Training: gradients reach the steering and nothing else, and what was trained is what is served."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Adam
from transformers import AutoModelForCausalLM

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import TokenPrompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AddSpec, ProjectionCapSpec, SteeringSpec
from steer_service.hf import HFSteeringModel, TrainableAblation, TrainableAdd, TrainableCap
from steer_service.hf.layers import decoder_layers
from tests.tiny_models import LAYERS, WIDTH, ModelFolder

TOKENS = torch.arange(300, 324).reshape(2, 12)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


@pytest.fixture
def model(model_folder: ModelFolder) -> Iterator[HFSteeringModel]:
    with HFSteeringModel(model_folder("llama"), target_layers=[1, 2], init_scale=0.1) as model:
        yield model


def direction(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


def test_the_loop_that_users_start_from_lowers_the_loss(model: HFSteeringModel):
    optimizer = Adam(model.get_trainable_parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        outputs = model(**BATCH)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_reach_the_steering_and_nothing_else(model: HFSteeringModel):
    model(**BATCH).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert len(model.get_trainable_parameters()) == 2
    assert all(parameter.grad.norm() > 0 for parameter in model.get_trainable_parameters())


def test_with_nothing_to_add_the_output_is_the_models_own(model_folder: ModelFolder):
    plain = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    want = plain(**BATCH)
    with HFSteeringModel(plain, target_layers=range(LAYERS)) as model:
        got = model(**BATCH)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("kind", ["add", "cap", "ablation"])
async def test_what_was_trained_is_what_its_spec_does(model_folder: ModelFolder, kind: str):
    """The states of `forward` are those of a request with `to_spec()`."""
    steering = {
        "add": TrainableAdd(direction(1)),
        "cap": TrainableCap(direction(2), min=-0.1, max=0.2),
        "ablation": TrainableAblation(direction(3), 0.3),
    }[kind]
    with HFSteeringModel(model_folder("llama"), dtype=torch.float32) as model:
        model.set_steering(2, steering)
        with torch.no_grad():
            seen = model(input_ids=TOKENS[:1], output_hidden_states=True).hidden_states[3][0].numpy()
        _, handles = await model.generate(
            TokenPrompt(token_ids=TOKENS[0].tolist()), max_tokens=1, steering_spec=model.to_spec(), capture_layers=[2]
        )
        async with handles[0] as handle:
            captures = await handle.fetch()
        np.testing.assert_allclose(captures[2][0]["hidden"], seen, rtol=1e-5, atol=1e-5)
        plain, _ = await model.generate(["The sea"], max_tokens=4, temperature=0.0)
        steered, _ = await model.generate(["The sea"], max_tokens=4, temperature=0.0, steering_spec=SteeringSpec())
        assert plain == steered  # a request is steered by its own spec, and by nothing else


def test_bounds_and_scales_are_trained(model_folder: ModelFolder):
    with HFSteeringModel(model_folder("llama"), dtype=torch.float32) as model:
        model.set_steering(1, TrainableCap(direction(2), min=-0.01, max=0.01))
        model.set_steering(2, TrainableAblation(direction(3), 0.5))
        assert len(model.get_trainable_parameters()) == 5
        model(**BATCH).loss.backward()
        grads = {name: parameter.grad for name, parameter in model.steering.named_parameters()}
        assert set(grads) == {"1.vector", "1.min", "1.max", "2.vector", "2.scale"}
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


def test_gradients_are_those_of_finite_differences(model_folder: ModelFolder):
    with HFSteeringModel(model_folder("llama"), dtype=torch.float64) as model:
        model.set_steering(1, TrainableAblation(direction(3), 0.5))
        scale = model.steering["1"].scale

        def loss() -> torch.Tensor:  # the model's own is computed in float32
            logits = model(input_ids=TOKENS).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())

        loss().backward()
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                scale += step
                losses.append(loss().item())
                scale -= step
        assert scale.grad.item() == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=1e-3)


def test_gradient_checkpointing_gives_the_same_gradients(model: HFSteeringModel):
    model.train()
    model(**BATCH).loss.backward()
    want = [parameter.grad.clone() for parameter in model.get_trainable_parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**BATCH).loss.backward()
    for parameter, grad in zip(model.get_trainable_parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    model.gradient_checkpointing_disable()


def test_a_bfloat16_model_trains_float32_steering(model_folder: ModelFolder):
    with HFSteeringModel(model_folder("llama"), target_layers=[1], dtype=torch.bfloat16) as model:
        assert model.steering["1"].vector.dtype == torch.float32
        optimizer = Adam(model.get_trainable_parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(**BATCH).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_it_works_under_accelerate(model: HFSteeringModel):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, Adam(model.get_trainable_parameters(), lr=1e-2))
    before = model.get_steering_vector(1)
    accelerator.backward(prepared(**BATCH).loss)
    optimizer.step()
    assert not torch.equal(model.get_steering_vector(1), before)


async def test_one_thread_generates_while_another_trains(model: HFSteeringModel):
    want, _ = await model.generate(["The sea"], SamplingOptions(max_tokens=12, temperature=0.0))

    def train() -> list[float]:
        return [model(**BATCH).loss.item() for _ in range(20)]

    (texts, _), losses = await asyncio.gather(
        model.generate(["The sea"], SamplingOptions(max_tokens=12, temperature=0.0)), asyncio.to_thread(train)
    )
    assert texts == want
    assert len(set(losses)) == 1


def test_padded_batches_are_as_masked(model: HFSteeringModel):
    """The loss of a padded batch is that of its rows without padding."""
    row = TOKENS[:1, :7]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), row], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 7])
    labels = padded.masked_fill(mask == 0, -100)
    labels[0, 5] = -100  # nothing comes before the first token that could predict it
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = model(input_ids=row, labels=row).loss
    got = model(input_ids=padded, attention_mask=mask, labels=labels, position_ids=positions).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_vectors_are_set_and_read(model: HFSteeringModel):
    model.set_steering_vector(3, direction(5))
    assert model.target_layers == (1, 2, 3)
    np.testing.assert_array_equal(model.get_steering_vector(3).numpy(), direction(5))
    assert model.get_steering_vector(0) is None
    model.get_steering_vector(3).zero_()  # a copy
    [add] = model.to_spec().layers[3].operations
    np.testing.assert_allclose(add.materialize(), direction(5), rtol=1e-6)
    [twice] = model.to_spec(scale=2.0).layers[3].operations
    np.testing.assert_allclose(twice.materialize(), 2 * direction(5), rtol=1e-6)


def test_a_vector_of_zeros_is_no_operation(model_folder: ModelFolder):
    with HFSteeringModel(model_folder("llama"), target_layers=[1]) as model:
        assert model.to_spec() == SteeringSpec()


@pytest.mark.parametrize(
    ("break_it", "field"),
    [
        (lambda model: model.set_steering_vector(4, direction(1)), "layer"),
        (lambda model: model.set_steering_vector(-1, direction(1)), "layer"),
        (lambda model: model.get_steering_vector(True), "layer"),
        (lambda model: model.set_steering_vector(1, direction(1)[:5]), "vector"),
        (lambda model: model.set_steering_vector(3, direction(1)[:5]), "vector"),
        (lambda model: model.set_steering(1, TrainableAdd(np.zeros(5, np.float32))), "vector"),
        (lambda _: TrainableCap(direction(1)), "min"),
        (lambda _: TrainableCap(direction(1), min=1.0, max=0.0), "min"),
    ],
    ids=str,
)
def test_invalid_vectors_and_layers_are_refused_by_field(model: HFSteeringModel, break_it: Any, field: str):
    with pytest.raises(InvalidRequest) as refused:
        break_it(model)
    assert refused.value.field == field


def test_bounds_that_training_inverted_are_refused(model: HFSteeringModel):
    cap = TrainableCap(direction(1), min=-1.0, max=1.0)
    model.set_steering(1, cap)
    with torch.no_grad():
        cap.min.fill_(2.0)
    with pytest.raises(InvalidRequest) as refused:
        model.to_spec()
    assert refused.value.reason == "INVERTED_BOUNDS"


def test_a_target_layer_out_of_range_is_refused_and_leaves_no_hooks(model_folder: ModelFolder):
    plain = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with pytest.raises(InvalidRequest):
        HFSteeringModel(plain, target_layers=[LAYERS])
    assert not any(layer._forward_hooks for layer in decoder_layers(plain))


def test_a_model_whose_layers_are_not_found_is_refused():
    with pytest.raises(Unsupported) as refused:
        HFSteeringModel(torch.nn.Linear(2, 2))
    assert refused.value.reason == "UNKNOWN_ARCHITECTURE"


def test_specs_of_training_are_plain_specs(model: HFSteeringModel):
    model.set_steering(1, TrainableCap(direction(1), max=0.5))
    spec = model.to_spec()
    assert isinstance(spec.layers[1].operations[0], ProjectionCapSpec)
    assert isinstance(spec.layers[2].operations[0], AddSpec)
