"""What servers answer whose models can be computed in the test: the fake backend, and the deterministic model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from steer_service.core.capture import CaptureSite
from steer_service.testing.fake_backend import FAKE_MODEL, encode_row, token_at
from tests.engine.deterministic_model import rules


class Oracle(ABC):
    """Knows what one model does."""

    name: str
    """What ORACLES calls it."""

    @abstractmethod
    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """The tokens that follow a prompt at temperature 0."""

    @abstractmethod
    def rows(self, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, np.ndarray]:
        """Layer -> the stream after it of all tokens that were fed, float32 of shape [tokens, width]."""


class FakeOracle(Oracle):
    name = "fake"

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return [token_at(prompt, 0, number, FAKE_MODEL.vocab_size) for number in range(count)]

    def rows(self, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, np.ndarray]:
        return {
            layer: np.stack([encode_row(layer, position, token) for position, token in enumerate(tokens)])
            for layer in layers
        }


class DeterministicOracle(Oracle):
    name = "deterministic"

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return rules.greedy_tokens(prompt, count)

    def rows(self, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, np.ndarray]:
        after_LTD = rules.streams_of(tokens, None, len(tokens))[CaptureSite.AFTER]
        return {layer: after_LTD[layer] for layer in layers}


FAKE, DETERMINISTIC = FakeOracle(), DeterministicOracle()
ORACLES: dict[str, Oracle] = {oracle.name: oracle for oracle in (FAKE, DETERMINISTIC)}
