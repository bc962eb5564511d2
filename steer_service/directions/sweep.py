"""The effect of a direction on target texts, at one scale after another, on any backend."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import SteeringSpec
from steer_service.directions.targets import Target
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.scoring import AnswerScorer

Measure = Callable[[SteeringSpec | None], Awaitable[npt.NDArray[np.float64]]]
"""Steering -> log-probabilities (nats per token) of some targets under it, shape [targets]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepPoint:
    """The result for the targets at one scale."""

    scale: float
    """The factor for the direction."""
    log_probabilities: npt.NDArray[np.float64]
    """Mean log-probability (nats) per token of each target's text, shape [targets]."""
    raised: float
    """Share of the targets that are more likely than without steering."""

    @property
    def mean(self) -> float:
        """The mean of all targets."""
        return float(self.log_probabilities.mean())


async def sweep_scales(
    measure: Measure, spec_at: Callable[[float], SteeringSpec], scales: Iterable[float]
) -> list[SweepPoint]:
    """The results of `measure` with `spec_at(scale)`, at ascending scales. Shows a bar on standard error.

    `measure` is `target_measure` of a model and targets, or a similar function. `spec_at` is `to_spec` of a
    direction or of a trained model. Raises what they raise.
    """
    unsteered = await measure(None)
    points = []
    for scale in tqdm(sorted(set(scales)), desc="sweep", unit="scale", disable=None):
        steered = await measure(spec_at(scale)) if scale else unsteered
        points.append(SweepPoint(scale=scale, log_probabilities=steered, raised=float((steered > unsteered).mean())))
    return points


def target_measure(model: SteeringCalls, targets: Sequence[Target]) -> Measure:
    """Measures the mean log-probability (nats) per token of each target's text; see `target_log_probabilities`.

    The prompts are tokenized once, so that each target needs one request for each steering.
    """
    prompts, texts = [target.prompt for target in targets], [target.text for target in targets]
    scorer = AnswerScorer(model.complete, prompts, texts, name="targets")

    async def measure(steering: SteeringSpec | None) -> npt.NDArray[np.float64]:
        if not targets:
            raise InvalidRequest("there are no targets", reason="NO_TARGETS", field="targets")
        return np.array([score.mean for score in await scorer.score(steering)])

    return measure


async def target_log_probabilities(
    model: SteeringCalls, targets: Sequence[Target], steering: SteeringSpec | None = None
) -> npt.NDArray[np.float64]:
    """Mean log-probability (nats) per token of each target's text under `steering`, shape [targets].

    Works on every backend, with one request for each target and one for each prompt. Positions of the steering are
    those that it has when the model generates the target. On transformers, `training.log_probabilities` needs fewer
    passes. Raises InvalidRequest without targets, for a target whose tokens do not follow its prompt's, or for a
    request that the model refuses.
    """
    return await target_measure(model, targets)(steering)
