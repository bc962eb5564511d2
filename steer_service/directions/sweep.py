"""The effect of a direction on target texts, at one scale after another, on any backend."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from steer_service.core.errors import EngineFailed, InvalidRequest, Unsupported, within
from steer_service.core.prompt import Prompt, TokenPrompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.directions.targets import Target
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.handle import all_or_none
from steer_service.runtime.results import Generation

Measure = Callable[[SteeringSpec | None], Awaitable[npt.NDArray[np.float64]]]
"""Steering -> log-probabilities (nats per token) of some targets under it, shape [targets]."""

SURE_BIAS = 100.0
"""Added to the logit of a token to choose it; the highest value that a request may have."""


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

    `measure` is `target_log_probabilities` with a model and targets, or a similar function. `spec_at` is `to_spec` of a
    direction or of a trained model. Raises what they raise.
    """
    unsteered = await measure(None)
    points = []
    for scale in tqdm(sorted(set(scales)), desc="sweep", unit="scale", disable=None):
        steered = await measure(spec_at(scale)) if scale else unsteered
        points.append(SweepPoint(scale=scale, log_probabilities=steered, raised=float((steered > unsteered).mean())))
    return points


async def target_log_probabilities(
    model: SteeringCalls, targets: Sequence[Target], steering: SteeringSpec | None = None
) -> npt.NDArray[np.float64]:
    """Mean log-probability (nats) per token of each target's text under `steering`, shape [targets].

    Works on every backend, with one request per token. A bias makes the request generate the target's next token; its
    log-probability is the one before the bias. On transformers, `training.log_probabilities` needs fewer passes.
    Raises InvalidRequest without targets, for a target whose tokens do not follow its prompt's, or for a request that
    the model refuses. Raises Unsupported for a spec with positions, which differ in each of these requests, and
    EngineFailed if another token was chosen.
    """
    if not targets:
        raise InvalidRequest("there are no targets", reason="NO_TARGETS", field="targets")
    if steering is not None and steering.positions is not None:
        raise Unsupported(
            "targets are measured with all positions steered", reason="POSITIONS", field="steering.positions"
        )
    prompts = await _token_ids(model, [target.prompt for target in targets])
    wholes = await _token_ids(model, [target.whole for target in targets])
    for index, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        with within(f"targets[{index}]"):
            _check_follows(prompt, whole)
    return np.array(
        await all_or_none(
            _mean_log_probability(model, whole, len(prompt), steering)
            for prompt, whole in zip(prompts, wholes, strict=True)
        )
    )


async def _token_ids(model: SteeringCalls, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The prompts' tokens as the backend makes them: the caller may have no tokenizer."""
    generations, _ = await model.generate(prompts, max_tokens=1, temperature=0.0, raw_output=True)
    return [generation.prompt_token_ids for generation in generations]


def _check_follows(prompt: tuple[int, ...], whole: tuple[int, ...]) -> None:
    if len(whole) <= len(prompt) or whole[: len(prompt)] != prompt:
        raise InvalidRequest(
            "the tokens of prompt and target together do not begin with those of the prompt; expected a target that "
            "begins with a space or after one message of a chat",
            reason="BAD_TARGET",
        )


async def _mean_log_probability(
    model: SteeringCalls, whole: tuple[int, ...], prompt_tokens: int, steering: SteeringSpec | None
) -> float:
    ends = range(prompt_tokens, len(whole))
    return float(np.mean(await all_or_none(_log_probability(model, whole[:end], whole[end], steering) for end in ends)))


async def _log_probability(
    model: SteeringCalls, before: tuple[int, ...], token: int, steering: SteeringSpec | None
) -> float:
    sampling = SamplingOptions(
        max_tokens=1, temperature=0.0, logprobs=0, logit_bias={token: SURE_BIAS}, ignore_eos=True
    )
    generations, _ = await model.generate(
        [TokenPrompt(token_ids=before)], sampling, steering_spec=steering, raw_output=True
    )
    generation: Generation = generations[0]
    chosen = generation.outputs[0].logprobs[0]
    if chosen.token_id != token:
        raise EngineFailed(
            f"token {chosen.token_id} was chosen in spite of a bias to {token}, which is too unlikely to measure",
            reason="NOT_CHOSEN",
        )
    return chosen.logprob
