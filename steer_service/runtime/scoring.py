"""The likelihood of given answers to prompts, on any backend: one request for each answer."""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from steer_service.core.errors import InvalidRequest, SteerError, within, within_each
from steer_service.core.one_line import one_line
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import OPEN_END
from steer_service.core.specs import LayerSteeringSpec, SteeringOp, SteeringSpec
from steer_service.runtime.deadline import CallLimit
from steer_service.runtime.many_prompts import ManyOptions, run_many
from steer_service.runtime.results import Generation

Answer = str | Sequence[int]
"""An answer as text, or as token ids that follow the prompt's."""

TOKENIZE = SamplingOptions(max_tokens=0)
"""Options of a request of which only the prompt's tokens are wanted: the caller may have no tokenizer."""

SCORE = replace(TOKENIZE, prompt_logprobs=0)


SCORED_WITH = ("model", "cache_salt", "priority")
"""Fields of a request that all requests of a score may have alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScore:
    """How likely an answer is."""

    token_ids: tuple[int, ...]
    """Tokens of the answer."""
    logprobs: tuple[float, ...]
    """Log-probability (nats) of each of them, given the prompt and the tokens before it."""

    __repr__ = one_line

    @property
    def total(self) -> float:
        """Log-probability of the whole answer in nats."""
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """Mean log-probability per token in nats."""
        return self.total / len(self.logprobs)


class AnswerScorer:
    """Scores the same answers under one steering after another; the prompts are tokenized once."""

    def __init__(
        self,
        run: Callable[[GenerateRequest], Awaitable[Generation]],
        prompts: Sequence[Prompt],
        answers: Sequence[Answer],
        *,
        name: str = "answers",
        fields: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`run`: completes a request. `name`: of the answers, for errors. There are as many prompts as answers.

        `fields`: of each request, such as its model.
        """
        self._run = run
        self._fields = fields
        self._prompts = prompts
        self._answers = answers
        self._name = name
        self._prompt_tokens: dict[Prompt, tuple[int, ...] | SteerError] = {}

    async def score(self, steering: SteeringSpec | None = None) -> list[AnswerScore]:
        """The scores under `steering`, in the order of the answers.

        Positions of the steering are those that it has when the model generates the answer after the prompt. Raises
        InvalidRequest for an empty answer, for an answer whose tokens do not follow its prompt's, and for a request
        that the model refuses.
        """
        scores = await self.score_many(steering, ManyOptions(limit=CallLimit.of("score", None)))
        return [score for score in scores if not isinstance(score, SteerError)]

    async def score_many(
        self, steering: SteeringSpec | None, how: ManyOptions
    ) -> list[AnswerScore] | list[AnswerScore | SteerError]:
        """The same, with the options of a call with many requests; the entry of a failed answer may be its error."""

        async def tokens_of(index: int) -> tuple[int, ...]:
            return await self._tokens(unknown[index])

        async def score_of(index: int) -> AnswerScore:
            tokens = self._prompt_tokens[self._prompts[index]]
            if isinstance(tokens, SteerError):
                raise copy(tokens) from tokens.__cause__  # each answer's error has its own number
            return await self._score(index, tokens, steering)

        first: dict[Prompt, int] = {}
        for index, prompt in enumerate(self._prompts):
            if prompt not in self._prompt_tokens:
                first.setdefault(prompt, index)
        unknown, numbers = list(first), list(first.values())
        found = await run_many(len(unknown), tokens_of, replace(how, progress=False), noun="prompts", numbers=numbers)
        self._prompt_tokens |= zip(unknown, found, strict=True)
        try:
            return await run_many(len(self._answers), score_of, how, noun=self._name)
        finally:
            for prompt, tokens in zip(unknown, found, strict=True):
                if isinstance(tokens, SteerError):
                    del self._prompt_tokens[prompt]

    async def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        return (await self._run(GenerateRequest(prompt=prompt, sampling=TOKENIZE, **self._fields))).prompt_token_ids

    async def _score(self, index: int, tokens: tuple[int, ...], steering: SteeringSpec | None) -> AnswerScore:
        prompt, answer = self._prompts[index], self._answers[index]
        with within(f"{self._name}[{index}]"):
            whole = (
                with_answer(prompt, answer) if isinstance(answer, str) else TokenPrompt(token_ids=(*tokens, *answer))
            )
        steered = after_prompt(steering, len(tokens))
        request = GenerateRequest(prompt=whole, sampling=SCORE, steering=steered, **self._fields)
        generation = await self._run(request)
        with within(f"{self._name}[{index}]"):
            _check_follows(tokens, generation.prompt_token_ids)
        scores = generation.prompt_logprobs[len(tokens) :]
        return AnswerScore(
            token_ids=generation.prompt_token_ids[len(tokens) :],
            logprobs=tuple(entry.logprob for entry in scores if entry is not None),
        )


def with_answer(prompt: Prompt, answer: str) -> Prompt:
    """Prompt and answer as one prompt. Raises InvalidRequest for a prompt of token ids, which has no text."""
    match prompt:
        case TextPrompt():
            return replace(prompt, text=prompt.text + answer)
        case ChatPrompt():
            *before, last = prompt.messages
            if prompt.continue_final_message:
                return replace(prompt, messages=(*before, replace(last, content=last.content + answer)))
            turn = ChatMessage(role="assistant", content=answer)
            messages = (*prompt.messages, turn)
            return replace(prompt, messages=messages, continue_final_message=True, add_generation_prompt=None)
    raise InvalidRequest("text follows text or a chat, not token ids", reason="BAD_TARGET", field="prompt")


def after_prompt(steering: SteeringSpec | None, prompt_tokens: int) -> SteeringSpec | None:
    """The steering of a request whose prompt is prompt and answer together."""
    if steering is None:
        return None
    with within("steering"), within_each("layers", steering.layers.items()) as given:
        layers = {layer: _layer_after_prompt(spec, prompt_tokens) for layer, spec in given}
    with within("steering.positions"):
        return replace(steering, layers=layers, positions=_scope_after_prompt(steering.positions, prompt_tokens))


def _layer_after_prompt(layer: LayerSteeringSpec, prompt_tokens: int) -> LayerSteeringSpec:
    if all(operation.positions is None for operation in layer.operations):
        return layer
    operations: list[SteeringOp] = []
    with within_each("operations", enumerate(layer.operations)) as given:
        for _, operation in given:
            with within("positions"):
                scope = _scope_after_prompt(operation.positions, prompt_tokens)
            operations.append(replace(operation, positions=scope))
    return replace(layer, operations=tuple(operations))


def _scope_after_prompt(scope: PositionScope | None, prompt_tokens: int) -> PositionScope | None:
    if scope is None:
        return None
    spans = scope.resolve(prompt_tokens, OPEN_END)  # refuses what depends on more than the length of the prompt
    return PositionScope(
        ranges=tuple(PositionRange(first, None if end == OPEN_END else end - 1) for first, end in spans)
    )


def _check_follows(prompt: tuple[int, ...], whole: tuple[int, ...]) -> None:
    if len(whole) <= len(prompt) or whole[: len(prompt)] != prompt:
        raise InvalidRequest(
            "the tokens of prompt and answer together do not begin with those of the prompt; expected an answer that "
            "begins with a space or follows a chat, or token ids",
            reason="BAD_TARGET",
        )
