"""Trains steering towards target texts, and computes how likely a model finds them.

Letters: B sequences of a batch, T tokens of the longest of them, V vocabulary.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.specs import SteeringSpec
from steer_service.directions.targets import Target
from steer_service.hf.batch import evaluating
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.prompts import render_prompt

IGNORED = -100
"""Label of a token that is left out of the loss, as in transformers."""

EPOCHS = 10
BATCH_SIZE = 8
LEARNING_RATE = 0.02
"""Defaults of `train`."""


@dataclass(frozen=True, slots=True)
class TargetTokens:
    """A target in tokens."""

    prompt: tuple[int, ...]
    """Tokens of the prompt."""
    target: tuple[int, ...]
    """Tokens of the target."""


def train(
    model: HFSteeringModel,
    targets: Sequence[Target],
    *,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> list[float]:
    """Trains all trainable steering of the model with Adam to make the targets more likely. Shows a bar on stderr.

    The loss is the mean negative log-probability (nats) of the target's tokens only. `learning_rate` is in units of the
    residual stream: about the change of a vector's element per step. `seed` orders the targets. Returns the loss
    before each step. Raises InvalidRequest for a model without target layers, without targets, for a target
    that does not fit the model and for a loss that is not finite.
    """
    parameters = model.get_trainable_parameters()
    if not parameters:
        raise InvalidRequest(
            "nothing is trainable: the model has no target layers", reason="NO_TARGET_LAYERS", field="target_layers"
        )
    tokens = target_tokens(model, targets)
    order = random.Random(seed)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses: list[float] = []
    steps = epochs * math.ceil(len(tokens) / batch_size)
    with torch.enable_grad(), tqdm(total=steps, desc="train", unit="step", disable=None) as bar:
        for _ in range(epochs):
            for some in _batches(order.sample(tokens, len(tokens)), batch_size):
                losses.append(_step(model, optimizer, some))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
    return losses


def log_probabilities(
    model: HFSteeringModel,
    targets: Sequence[Target],
    steering: SteeringSpec | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> npt.NDArray[np.float64]:
    """Mean log-probability (nats) per token of each target's text under `steering` only, shape [targets].

    None is no steering, even on a trained model. Raises InvalidRequest for steering that does not fit the model, and
    Unsupported for a spec with positions.
    """
    tokens = target_tokens(model, targets)
    with torch.inference_mode(), evaluating(model.model), model.steered_by(steering):
        means = [mean for some in _batches(tokens, batch_size) for mean in _mean_log_probabilities(model, some)]
    return np.array(means)


def target_tokens(model: HFSteeringModel, targets: Sequence[Target]) -> list[TargetTokens]:
    """The targets' tokens; raises InvalidRequest, with the number of the target from 0, for one that does not fit."""
    if not targets:
        raise InvalidRequest("there are no targets", reason="NO_TARGETS", field="targets")
    tokens = []
    for index, target in enumerate(targets):
        with within(f"targets[{index}]"):
            tokens.append(_tokens_of(model, target))
    return tokens


def _tokens_of(model: HFSteeringModel, target: Target) -> TargetTokens:
    prompt = render_prompt(target.prompt, model.tokenizer, with_boundaries=False, defaults=model.chats).token_ids
    own = tuple(model.tokenizer.encode(target.text, add_special_tokens=False))
    limit = model.info.max_model_len
    if not prompt or not own or len(prompt) + len(own) > limit:
        raise InvalidRequest(
            f"prompt and target have {len(prompt)} and {len(own)} tokens; expected at least one each and {limit} "
            "together at most",
            reason="BAD_TARGET",
        )
    return TargetTokens(prompt, own)


def _batches(tokens: Sequence[TargetTokens], size: int) -> Iterator[Sequence[TargetTokens]]:
    return (tokens[first : first + size] for first in range(0, len(tokens), size))


def _step(model: HFSteeringModel, optimizer: torch.optim.Optimizer, some: Sequence[TargetTokens]) -> float:
    optimizer.zero_grad()
    loss = model(**_batch(some, model.device)).loss
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InvalidRequest(
            f"the loss is {value}; a lower learning rate may help", reason="NON_FINITE", field="learning_rate"
        )
    loss.backward()
    optimizer.step()
    return value


def _mean_log_probabilities(model: HFSteeringModel, some: Sequence[TargetTokens]) -> list[float]:
    batch = _batch(some, model.device)
    labels_BT = batch.pop("labels")[:, 1:]
    logits_BTV = model(**batch).logits[:, :-1]
    means = []
    for labels_T, logits_TV in zip(labels_BT, logits_BTV, strict=True):
        chosen = labels_T != IGNORED
        logprobs = logits_TV[chosen].float().log_softmax(-1)
        means.append(float(logprobs.gather(1, labels_T[chosen][:, None]).double().mean()))
    return means


def _batch(some: Sequence[TargetTokens], device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each [B, T], padded on the right."""
    length = max(len(one.prompt) + len(one.target) for one in some)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows], device=device)

    return {
        "input_ids": padded([[*one.prompt, *one.target] for one in some], 0),
        "attention_mask": padded([[1] * (len(one.prompt) + len(one.target)) for one in some], 0),
        "labels": padded([[IGNORED] * len(one.prompt) + list(one.target) for one in some], IGNORED),
    }
