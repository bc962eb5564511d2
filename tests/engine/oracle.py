"""The truth about a model's stream: HuggingFace in float64 with the reference operations hooked in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from steer_service.core.positions import PositionScope
from steer_service.core.spans import clipped, positions_of
from steer_service.core.specs import SteeringSpec
from steer_service.ops.reference import apply_operation


class Oracle:
    """Recomputes whole sequences, one at a time, without cache or batch."""

    def __init__(
        self, folder: Path, mend: Callable[[Any], None] | None = None, kind: Any = AutoModelForCausalLM
    ) -> None:
        self._model = kind.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",  # the others leave out soft-capping
            experts_implementation="eager",  # the others know no float64
        ).eval()
        if mend is not None:
            mend(self._model)
        self._layers = next(
            module
            for module in self._model.modules()
            if isinstance(module, torch.nn.ModuleList)
            and len(module) == self._model.config.get_text_config().num_hidden_layers
        )

    def streams(
        self,
        token_ids: Sequence[int],
        steering: SteeringSpec | None,
        *,
        prompt_tokens: int | None = None,
        before: bool = False,
    ) -> dict[int, np.ndarray]:
        """Layer -> the stream after that layer and its steering, shape [tokens, hidden_size], float64.

        `prompt_tokens` is needed where the steering narrows its positions; `before` returns the stream before each
        layer's own steering instead.
        """
        streams: dict[int, np.ndarray] = {}
        rows = [slice(None)]
        if steering is not None:
            rows = [_rows(scope, prompt_tokens, len(token_ids)) for scope in steering.numbered_scopes().paths.values()]
        hooks = [
            layer.register_forward_hook(self._hook(index, steering, rows, streams, before))
            for index, layer in enumerate(self._layers)
        ]
        try:
            with torch.no_grad():
                self._logits = self._model(torch.tensor([list(token_ids)])).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        return streams

    def perturbed(self, token_ids: Sequence[int], unit: float, *, alike: bool, seed: int = 0) -> dict[int, np.ndarray]:
        """`streams`, but each number that a layer or one of its matrices reads is changed by a relative `unit`.

        Up or down, at random: `alike` at all positions, as equal tokens are rounded alike, or at each for itself.
        """
        generator = torch.Generator().manual_seed(seed)

        def perturb(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            shape = args[0].shape[-1:] if alike else args[0].shape
            signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            return (args[0] * (1.0 + unit * signs), *args[1:])

        matrices = [part for layer in self._layers for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        hooks = [part.register_forward_pre_hook(perturb) for part in (*self._layers, *matrices)]
        try:
            return self.streams(token_ids, None)
        finally:
            for hook in hooks:
                hook.remove()

    def logprobs(self, token_ids: Sequence[int], steering: SteeringSpec | None, prompt_tokens: int) -> list[float]:
        """Log-probability of each token after the prompt, given all before it."""
        self.streams(token_ids[:-1], steering, prompt_tokens=prompt_tokens)
        table = torch.log_softmax(self._logits, dim=-1)
        return [table[i - 1, token_ids[i]].item() for i in range(prompt_tokens, len(token_ids))]

    @staticmethod
    def _hook(  # type: ignore[no-untyped-def]
        index: int,
        steering: SteeringSpec | None,
        rows: Sequence[slice | np.ndarray],
        streams: dict[int, np.ndarray],
        before: bool,
    ):
        def hook(module: torch.nn.Module, args: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
            stream = output[0] if isinstance(output, tuple) else output
            if before:
                streams[index] = stream[0].numpy().copy()
            if steering is not None and index in steering.active_layers():
                stream = stream.clone()
                numbers = steering.numbered_scopes().numbers[index]
                for operation, number in zip(steering.layers[index].operations, numbers, strict=True):
                    stream[0, rows[number]] = apply_operation(stream[0, rows[number]], operation)
            if not before:
                streams[index] = stream[0].numpy()
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        return hook


def _rows(scope: PositionScope | None, prompt_tokens: int | None, count: int) -> slice | np.ndarray:
    if scope is None:
        return slice(None)
    assert prompt_tokens is not None
    return positions_of(clipped(scope.resolve(prompt_tokens, count), count))


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest distance of a row from its truth, in units of that row's norm."""
    return float(relative_errors(got, want).max())


def relative_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distance of each row from its truth, in units of that row's norm."""
    assert got.shape == want.shape
    distance = np.linalg.norm(got.astype(np.float64) - want, axis=-1)
    return distance / np.linalg.norm(want.astype(np.float64), axis=-1)
