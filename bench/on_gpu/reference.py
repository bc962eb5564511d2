"""The residual streams of a model in float64, by transformers and the operations of `steer_service.hf`.

Nothing of vLLM, of the kernels or of the engine's hooks has a part in it. It is also perturbed, to find how far the
model carries roundings: see "Captured rows of whole models" in docs/numerics.md.

B: sequences; T: tokens; D: hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from steer_service.core.spans import mask_of
from steer_service.core.specs import SteeringSpec
from steer_service.hf.layers import ResidualHooks, decoder_layers
from steer_service.hf.programs import TorchProgram

Streams = dict[int, npt.NDArray[np.float64]]
"""Layer -> the residual stream after that layer and its steering, shape [tokens, hidden_size]."""

BATCH = 16
"""Sequences of one forward pass; padding makes more of them slower on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One sequence to compute."""

    token_ids: tuple[int, ...]
    """All tokens that are fed to the model."""
    prompt_tokens: int
    """How many of them are the prompt's."""
    steering: SteeringSpec | None
    layers: tuple[int, ...]
    """Layers whose streams are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """A change of each number that a layer or one of its matrices reads."""

    unit: float
    """Relative size; the sign is random."""
    is_alike: bool
    """True: the same signs at all positions, as equal tokens are rounded alike."""
    seed: int


class Reference:
    """A model in float64; equal rows of different batches agree to a few of its roundings."""

    def __init__(self, folder: Path, device: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self._layers = decoder_layers(model)
        self._hooks = ResidualHooks(self._layers, lambda layer, stream_BTD: stream_BTD)

    def streams(self, sequences: Sequence[TokenSequence], perturbation: Perturbation | None = None) -> list[Streams]:
        """The streams of each sequence, in order."""
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].token_ids))
        found: dict[int, Streams] = {}
        with self._perturbed(perturbation):
            for first in range(0, len(order), BATCH):
                indices = order[first : first + BATCH]
                found.update(zip(indices, self._batch([sequences[index] for index in indices]), strict=True))
        return [found[index] for index in range(len(sequences))]

    @torch.inference_mode()
    def _batch(self, sequences: Sequence[TokenSequence]) -> list[Streams]:
        works = [_Work(sequence, self._device) for sequence in sequences]
        longest = max(len(sequence.token_ids) for sequence in sequences)
        # Padding comes last, where causal attention hides it from every token.
        ids = [[*sequence.token_ids, *[0] * (longest - len(sequence.token_ids))] for sequence in sequences]

        def change(layer: int, stream_BTD: torch.Tensor) -> torch.Tensor:
            changed_BTD = stream_BTD.clone()
            for row, work in enumerate(works):
                work.visit(layer, changed_BTD[row])
            return changed_BTD

        with self._hooks.instead(change):
            self._model(input_ids=torch.tensor(ids, device=self._device), use_cache=False, logits_to_keep=1)
        return [work.streams for work in works]

    @contextmanager
    def _perturbed(self, perturbation: Perturbation | None) -> Iterator[None]:
        if perturbation is None:
            yield
            return
        matrices = [part for layer in self._layers for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        hook = _hook_of(perturbation, self._device)
        handles = [part.register_forward_pre_hook(hook) for part in (*self._layers, *matrices)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Work:
    """Steers one sequence of a batch, and keeps its streams."""

    def __init__(self, sequence: TokenSequence, device: torch.device) -> None:
        self.streams: Streams = {}
        self._sequence, self._count = sequence, len(sequence.token_ids)
        self._program = TorchProgram(sequence.steering, device) if sequence.steering is not None else None
        self._is_inside_ST = [torch.from_numpy(mask).to(device) for mask in _masks(sequence)]

    def visit(self, layer: int, stream_TD: torch.Tensor) -> None:
        rows_TD = stream_TD[: self._count]
        if self._program is not None and layer in self._program.layers:
            rows_TD[:] = self._program.apply(layer, rows_TD, self._is_inside_ST)
        if layer in self._sequence.layers:
            self.streams[layer] = rows_TD.cpu().numpy().copy()


def _masks(sequence: TokenSequence) -> list[npt.NDArray[np.bool_]]:
    """For each scope of the program, which positions are inside."""
    if sequence.steering is None:
        return []
    rows = len(sequence.token_ids)
    return [
        np.ones(rows, np.bool_) if scope is None else mask_of(scope.resolve(sequence.prompt_tokens, rows), rows)
        for scope in sequence.steering.numbered_scopes().paths.values()
    ]


def _hook_of(perturbation: Perturbation, device: torch.device) -> Callable[..., Any]:
    generator = torch.Generator(device).manual_seed(perturbation.seed)

    def perturb(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        shape = arguments[0].shape[-1:] if perturbation.is_alike else arguments[0].shape
        signs = torch.randint(0, 2, shape, generator=generator, device=device) * 2 - 1
        return (arguments[0] * (1.0 + perturbation.unit * signs), *arguments[1:])

    return perturb
