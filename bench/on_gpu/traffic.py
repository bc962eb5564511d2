"""Requests with mixed steering and captures, for a comparison with an independent computation.

Each request has a program of its own. It captures every row of its steered layers, of one more and of the last layer,
before and after steering, in float32: a model's own dtype would round what steering read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.load import FIRST_TOKEN_ID
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import (
    AblationSpec,
    AddScaling,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)

PROMPT_TOKENS, NEW_TOKENS = range(3, 25), range(3, 9)
"""Lengths of prompts and answers, all of which occur."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request."""

    kind: str
    """Its steering in words, one of KINDS."""
    request: GenerateRequest
    """What is submitted; its prompt is token ids."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        assert isinstance(self.request.prompt, TokenPrompt)
        return self.request.prompt.token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """Of what a program is made: three layers, ascending, and an operation of each kind."""

    layers: tuple[int, int, int]
    add: AddSpec
    cap: ProjectionCapSpec
    ablation: AblationSpec
    direction: np.ndarray
    """A direction of norm 1 that no operation above has."""


def _one_layer(made: Materials, *operations: SteeringOp, positions: object = None) -> SteeringSpec:
    return SteeringSpec({made.layers[0]: LayerSteeringSpec(operations)}, positions=positions)  # type: ignore[arg-type]


def _three_layers(made: Materials) -> SteeringSpec:
    operations: tuple[SteeringOp, ...] = (made.add, made.cap, made.ablation)
    return SteeringSpec({layer: LayerSteeringSpec((one,)) for layer, one in zip(made.layers, operations, strict=True)})


def _own_positions(made: Materials) -> SteeringSpec:
    first = AddSpec(made.add.vector, made.add.scale, positions=-1)  # type: ignore[arg-type]  # see `scope_from`
    second = ProjectionCapSpec(made.cap.vector, -1.0, 1.0, positions=[0, "generated"])  # type: ignore[arg-type]
    return _one_layer(made, first, second, made.ablation)


KINDS: Mapping[str, Callable[[Materials], SteeringSpec | None]] = {
    "nothing": lambda made: None,
    "an addition": lambda made: _one_layer(made, made.add),
    "a cap": lambda made: _one_layer(made, made.cap),
    "an ablation": lambda made: _one_layer(made, made.ablation),
    "all three at one layer": lambda made: _one_layer(made, made.add, made.cap, made.ablation),
    "one at each of three layers": _three_layers,
    "a relative addition that keeps the norm": lambda made: _one_layer(
        made, AddSpec(made.direction, 0.5, scaling=AddScaling.RELATIVE, keep_norm=True)
    ),
    "an ablation with a limited change": lambda made: _one_layer(
        made, AblationSpec(made.direction, -5.0, max_relative_change=0.05)
    ),
    "an addition to generated tokens": lambda made: _one_layer(made, made.add, positions="generated"),
    "operations at different positions": _own_positions,
}
"""What a request steers -> its program."""


def requests_for(count: int, info: ModelInfo) -> list[Asked]:
    """`count` requests, in turn of each of KINDS; the same each time."""
    kinds = list(KINDS)
    return [_asked(kinds[number % len(kinds)], np.random.default_rng(number), info) for number in range(count)]


def _asked(kind: str, chance: np.random.Generator, info: ModelInfo) -> Asked:
    chosen = chance.choice(info.layer_count, 4, replace=False).tolist()
    steering = KINDS[kind](_materials(chance, sorted(chosen[:3]), info.hidden_size))
    steered = tuple(steering.layers) if steering is not None else ()
    prompt = chance.integers(FIRST_TOKEN_ID, info.vocab_size, int(chance.choice(PROMPT_TOKENS)))
    return Asked(
        kind=kind,
        request=GenerateRequest(
            prompt=TokenPrompt(token_ids=tuple(prompt.tolist())),
            sampling=SamplingOptions(max_tokens=int(chance.choice(NEW_TOKENS)), temperature=0.0, ignore_eos=True),
            steering=steering,
            capture=CaptureSpec(
                layers=(*steered, chosen[3], info.layer_count - 1), site=CaptureSite.BOTH, dtype="float32"
            ),
        ),
    )


def _materials(chance: np.random.Generator, layers: Sequence[int], hidden_size: int) -> Materials:
    low, middle, high = layers
    directions = chance.standard_normal((4, hidden_size))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Materials(  # rows of the bundled model have norms of about 100 in its middle
        layers=(low, middle, high),
        add=AddSpec(directions[0], 30.0),
        cap=ProjectionCapSpec(directions[1], min=-1.0, max=1.0),
        ablation=AblationSpec(directions[2], -2.0),
        direction=directions[3],
    )
