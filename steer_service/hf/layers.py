"""The decoder layers of a transformers model, and a hook after each of them.

Relies on (transformers 5): a decoder layer returns the residual stream after it, alone or as the first element of a
tuple. tests/hf compares the rows with those of an oracle.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from steer_service.core.errors import Unsupported
from steer_service.core.layer_paths import TRANSFORMERS_LAYER_PATHS, attributes_at

Change = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, residual stream after it) -> the residual stream that the next layer gets."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, at the first of TRANSFORMERS_LAYER_PATHS that leads to any.

    Raises Unsupported for a model that has none there.
    """
    for _, found in attributes_at(model, TRANSFORMERS_LAYER_PATHS):
        if isinstance(found, nn.ModuleList) and len(found):
            return found
    raise Unsupported(
        f"{type(model).__name__} has no decoder layers at any of {', '.join(TRANSFORMERS_LAYER_PATHS)}",
        reason="UNKNOWN_ARCHITECTURE",
    )


def widened(stream: torch.Tensor) -> torch.Tensor:
    """The residual stream in the dtype in which operations are computed: float32, or float64 for a float64 model."""
    return stream if stream.dtype == torch.float64 else stream.float()


class ResidualHooks:
    """Hooks after all decoder layers, which pass the residual stream through one function.

    That function is `change`. Within `instead`, the thread inside has another function: while one thread generates,
    others may train.
    """

    def __init__(self, layers: nn.ModuleList, change: Change) -> None:
        self._change = change
        self._here = threading.local()
        self._handles = [layer.register_forward_hook(self._hook_of(index)) for index, layer in enumerate(layers)]

    @contextmanager
    def instead(self, change: Change) -> Iterator[None]:
        """Within the block, in this thread, the residual stream passes through `change` alone."""
        before = getattr(self._here, "change", None)
        self._here.change = change
        try:
            yield
        finally:
            self._here.change = before

    def remove(self) -> None:
        """Removes the hooks from the layers; calling it again does nothing."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _hook_of(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
            change = getattr(self._here, "change", None) or self._change
            if isinstance(output, tuple):
                return (change(index, output[0]), *output[1:])
            return change(index, output)

        return hook
