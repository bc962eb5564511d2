"""Requests of all kinds at once: what users send, chosen by a seed."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steer_service.core.capture import CaptureDelivery, CaptureSite, CaptureSpec
from steer_service.core.positions import PositionRange, Positions
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from tests.engine.deterministic_model import rules

PROGRAMS = 10
"""Distinct programs of one traffic; a bank with fewer slots makes some of them wait."""

LONGEST = 300
"""Tokens of a prompt at most."""

SHARED_LENGTHS = (64, 70, 128, 33)
"""Lengths of the prefixes that prompts share: whole blocks of 32 and not."""

DELIVERIES = (
    (CaptureDelivery.INLINE, False),
    (CaptureDelivery.INLINE, True),
    (CaptureDelivery.HELD, False),
    (CaptureDelivery.SHARED_MEMORY_REQUIRED, False),
)
"""How captures are delivered, and whether live."""

WORDS = (
    "the",
    "sea",
    "is",
    "a",
    "wide",
    "and",
    "quiet",
    "place",
    "where",
    "ships",
    "go",
    "by",
    "night",
    "under",
    "stars",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request and when its caller goes away."""

    request: GenerateRequest
    """What is asked."""
    cancel_after: int | None = None
    """The caller goes away after so many deltas of text; None: it stays."""


def program(number: int) -> SteeringSpec:
    """Program `number`, made anew each time; exact in whole numbers, whatever the stream holds."""
    chance = random.Random(1000 + number)
    layers = chance.sample(range(rules.LAYERS), chance.randint(1, rules.LAYERS))
    return SteeringSpec(
        layers={layer: LayerSteeringSpec([_operation(chance) for _ in range(chance.randint(1, 3))]) for layer in layers}
    )


def _operation(chance: random.Random) -> AddSpec | ProjectionCapSpec | AblationSpec:
    direction = np.zeros(rules.WIDTH)
    direction[rules.MARKS + chance.randrange(rules.MARK_COUNT)] = 1.0
    match chance.choice(["add", "add", "cap", "ablation"]):
        case "add":
            return AddSpec(direction, scale=float(chance.choice([-7, -2, 3, 11, 100])))
        case "cap":
            return ProjectionCapSpec(direction, min=float(chance.randint(-5, 0)), max=float(chance.randint(1, 9)))
    return AblationSpec(direction, scale=float(chance.choice([-1, 0, 2])))


class Traffic:
    """Makes the cases of one seed; `decode` turns token ids into text, outputs have at most `most_tokens`."""

    def __init__(self, seed: int, decode: Callable[[Sequence[int]], str], *, most_tokens: int) -> None:
        self._chance = random.Random(seed)
        self._decode = decode
        self._most_tokens = most_tokens
        self._shared = [self._tokens(length) for length in SHARED_LENGTHS]
        self._made = 0

    def cases(self, count: int) -> list[Case]:
        """So many cases."""
        return [self._case() for _ in range(count)]

    def _case(self) -> Case:
        chance = self._chance
        steering = program(chance.randrange(PROGRAMS)) if chance.random() < 0.65 else None
        prompt = self._prompt()
        max_tokens = self._max_tokens()
        if steering is not None:
            steering = replace(steering, positions=self._scope(prompt, max_tokens))
        sampling = self._sampling(prompt, steering, max_tokens)
        capture = None
        if chance.random() < 0.6:
            delivery, is_live = chance.choice(DELIVERIES)
            capture = CaptureSpec(
                layers=chance.sample(range(rules.LAYERS), chance.randint(1, rules.LAYERS)),
                site=chance.choice([CaptureSite.AFTER, CaptureSite.AFTER, CaptureSite.BEFORE, CaptureSite.BOTH]),
                positions=self._scope(prompt, max_tokens),
                delivery=delivery,
                is_live=is_live,
            )
        self._made += 1
        request = GenerateRequest(
            prompt=prompt,
            sampling=sampling,
            steering=steering,
            capture=capture,
            request_id=f"case-{self._made}",
        )
        return Case(request=request, cancel_after=chance.randint(0, 4) if chance.random() < 0.12 else None)

    def _tokens(self, count: int) -> list[int]:
        return [self._chance.randrange(rules.FIRST_TOKEN, rules.LAST_TOKEN) for _ in range(count)]

    def _prompt(self) -> Prompt:
        chance = self._chance
        kind = chance.random()
        if kind < 0.12:
            return TextPrompt(text=self._words())
        if kind < 0.24:
            turns = [ChatMessage(role="user", content=self._words())]
            if chance.random() < 0.5:
                turns.insert(0, ChatMessage(role="system", content="You are at sea."))
            return ChatPrompt(messages=turns)
        if kind < 0.7:  # shared beginnings, some without anything after them
            return TokenPrompt(token_ids=chance.choice(self._shared) + self._tokens(chance.choice([0, 0, 1, 7, 30])))
        return TokenPrompt(token_ids=self._tokens(chance.choice([1, 2, 31, 32, 33, chance.randint(1, LONGEST)])))

    def _words(self) -> str:
        return " ".join(self._chance.choice(WORDS) for _ in range(self._chance.randint(1, 60)))

    def _max_tokens(self) -> int:
        most = self._most_tokens
        return self._chance.choice([1, 1, 2, self._chance.randint(3, most // 2), self._chance.randint(most // 2, most)])

    def _scope(self, prompt: Prompt, max_tokens: int) -> Positions | None:
        """Rows that this request has; half the time all of them."""
        chance = self._chance
        scopes: list[Positions] = ["prompt", -1, 0, [0, -1], PositionRange(-1, None)]
        if max_tokens > 1:
            scopes += ["generated", [0, "generated"]]
        if isinstance(prompt, TokenPrompt) and len(prompt.token_ids) > 40:
            scopes += [range(20, 36), PositionRange(33, -3), PositionRange(32, None)]
        return chance.choice(scopes) if chance.random() < 0.5 else None

    def _sampling(self, prompt: Prompt, steering: SteeringSpec | None, max_tokens: int) -> SamplingOptions:
        chance = self._chance
        n = chance.choice([None, None, None, 2, 3])
        temperature = chance.choice([0.0, 0.0, 1.0])
        stop: tuple[str, ...] = ()
        stop_token_ids: tuple[int, ...] = ()
        if temperature == 0.0 and isinstance(prompt, TokenPrompt) and chance.random() < 0.4:
            coming = rules.greedy_tokens(prompt.token_ids, max_tokens, steering)
            token = chance.choice(coming)
            text = self._decode([token]).strip()
            if chance.random() < 0.5 and text and "\ufffd" not in text:
                stop = (text,)
            else:
                stop_token_ids = (token,)
        return SamplingOptions(
            n=n,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=chance.randrange(1000) if chance.random() < 0.5 else None,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=chance.random() < 0.5,
            logprobs=chance.choice([None, None, 0, 2]),
        )
