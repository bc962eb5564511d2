"""What the deterministic model computes, in numpy: every number is a whole number, exact in float32.

The stream of a row after a layer names the layer, the position and the token. Six more columns chain a hash of every
row that the attention saw, one column per head: keys and values of another row, position, prompt or steering would
change them. Steering acts on the columns after them, which the hash reads too.
T: tokens; R: steered rows; D: width; H: heads.
"""

from collections.abc import Sequence

import numpy as np

from steer_service.core.capture import CaptureSite
from steer_service.core.positions import PositionScope
from steer_service.core.spans import EVERYWHERE, OPEN_END, clipped, positions_of
from steer_service.core.specs import LayerSteeringSpec, SteeringSpec

LAYERS = 4
HEADS = 6
"""Divisible by 2 and 3, the sizes of tensor parallelism that are tested."""
HEAD_SIZE = 32
"""The smallest that vLLM's CPU attention has."""
WIDTH = 48
VOCABULARY = 49152

LAYER, POSITION, TOKEN, CONTEXT, MARKS = 0, 1, 2, 3, 3 + HEADS
"""Columns: layers passed, position, token id, HEADS chained hashes, then columns for steering."""
MARK_COUNT = 4
END = MARKS + MARK_COUNT
"""Columns from here on are 0."""

HASH_MODULUS = 61
"""Small, so that the sum of 1024 hashes divided by 1024 can be multiplied back in float32."""
CONTEXT_MODULUS = 65521

FIRST_TOKEN, LAST_TOKEN = 100, VOCABULARY - 100
"""Tokens that the model chooses from: none that mean something to the tokenizer."""
CHOICES = 4
"""Tokens that sampling may pick after each row; at temperature 0 it is the first."""
CHOICE_LOGIT, CHOICE_STEP, CHOICE_DISTANCE = 60.0, 0.5, 7


def hash_weights() -> np.ndarray:
    """Shape [END, HEADS]: the weight of each column in each head's hash."""
    return np.random.default_rng(61).integers(1, HASH_MODULUS, size=(END, HEADS))


def choice_weights() -> np.ndarray:
    """Shape [END]: the weight of each column in the hash that chooses the next token."""
    return np.random.default_rng(62).integers(1, 50_000, size=END)


def streams_of(
    token_ids: Sequence[int], steering: SteeringSpec | None, prompt_tokens: int
) -> dict[CaptureSite, np.ndarray]:
    """The stream after each layer, before and after its steering, float32 of shape [LAYERS, T, WIDTH]."""
    rows = rows_of(steering.positions if steering is not None else None, prompt_tokens, len(token_ids))
    positions = np.arange(len(token_ids))
    stream_TD = np.zeros((len(token_ids), WIDTH), np.int64)
    stream_TD[:, POSITION], stream_TD[:, TOKEN] = positions, token_ids
    before, after = [], []
    for layer in range(LAYERS):
        hash_TH = stream_TD[:, :END] @ hash_weights() % HASH_MODULUS
        sums_TH = np.cumsum(hash_TH * hash_TH % HASH_MODULUS, axis=0)
        context_TH = stream_TD[:, CONTEXT:MARKS]
        stream_TD[:, CONTEXT:MARKS] = (3 * context_TH + sums_TH) % CONTEXT_MODULUS
        stream_TD[:, LAYER] += 1
        before.append(stream_TD.astype(np.float32))
        if steering is not None and layer in steering.layers:
            steered_RD = steered(stream_TD[rows], steering.layers[layer])
            stream_TD[rows] = steered_RD.astype(np.int64)
            assert (stream_TD[rows] == steered_RD).all(), "a spec that is not exact in whole numbers"
        assert abs(stream_TD).max() < 1 << 24, "a spec whose result is not exact in float32"
        after.append(stream_TD.astype(np.float32))
    return {CaptureSite.BEFORE: np.stack(before), CaptureSite.AFTER: np.stack(after)}


def steered(stream_RD: np.ndarray, steering: LayerSteeringSpec) -> np.ndarray:
    """The rows after one layer's steering, float64."""
    import torch  # only where something is steered: clients whose memory is measured predict without it

    from steer_service.ops.reference import apply_operations

    return apply_operations(torch.tensor(stream_RD, dtype=torch.float64), steering.operations).numpy()


def rows_of(scope: PositionScope | None, prompt_tokens: int, rows: int) -> np.ndarray:
    """The positions among the first `rows` that a scope means; None means all."""
    spans = EVERYWHERE if scope is None else scope.resolve(prompt_tokens, OPEN_END)
    return positions_of(clipped(spans, rows))


def choices_after(row_D: np.ndarray) -> list[int]:
    """The tokens that may follow a row of the last layer's stream, most probable first."""
    start = int(row_D[:END].astype(np.int64) @ choice_weights())
    span = LAST_TOKEN - FIRST_TOKEN
    return [FIRST_TOKEN + (start + CHOICE_DISTANCE * choice) % span for choice in range(CHOICES)]


def greedy_tokens(prompt: Sequence[int], count: int, steering: SteeringSpec | None = None) -> list[int]:
    """The tokens that follow a prompt at temperature 0."""
    tokens = list(prompt)
    for _ in range(count):
        after_LTD = streams_of(tokens, steering, len(prompt))[CaptureSite.AFTER]
        tokens.append(choices_after(after_LTD[-1, -1])[0])
    return tokens[len(prompt) :]
