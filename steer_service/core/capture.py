"""Which hidden states to return, and the handle through which a caller reads them."""

import asyncio
import enum
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.specs import MAX_LAYER_INDEX

Captures = dict[int, list[dict[str, npt.NDArray[Any]]]]
"""Layer -> a list of one dict `{"hidden": array of shape [rows, hidden_size]}`, the shape steerllm users know."""


class CaptureSite(enum.Enum):
    """Where, relative to this request's own steering of a layer, its stream is read."""

    AFTER = "after"
    """After steering: what the next layer sees."""
    BEFORE = "before"
    """Before steering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """Which layers' residual streams to return, for every row: prompt tokens + generated tokens - 1."""

    layers: tuple[int, ...]
    """Layer indices, 0-based; duplicates count once, the order is kept."""
    site: CaptureSite = CaptureSite.AFTER
    """Before or after steering."""
    max_chunk_bytes: int | None = None
    """Bytes of a chunk on the wire at most, 4 KiB..1 MiB. Default 256 KiB."""

    def __post_init__(self) -> None:
        layers = _layer_numbers(self.layers)
        for index, layer in enumerate(layers):
            with within(f"layers[{index}]"):
                _check_layer(layer)
        object.__setattr__(self, "layers", tuple(dict.fromkeys(int(layer) for layer in layers)))
        if not isinstance(self.site, CaptureSite):
            raise InvalidRequest(f"{self.site!r} is not a CaptureSite", reason="BAD_SITE", field="site")
        self._check_chunk()

    def _check_chunk(self) -> None:
        size = self.max_chunk_bytes
        if size is None:
            return
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 4096 <= size <= 1 << 20:
            raise InvalidRequest(f"{size!r} is outside 4096..1048576", reason="OUT_OF_RANGE", field="max_chunk_bytes")
        object.__setattr__(self, "max_chunk_bytes", int(size))


def _layer_numbers(layers: Any) -> tuple[Any, ...]:
    if isinstance(layers, (int, np.integer)):
        return (layers,)
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise InvalidRequest(
            f"layers must be layer numbers, got {type(layers).__name__}", reason="BAD_LAYER", field="layers"
        )
    return tuple(layers)


def _check_layer(layer: Any) -> None:
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
        raise InvalidRequest(f"layer {layer!r} is not an integer", reason="BAD_LAYER")
    if layer < 0:
        raise InvalidRequest(f"layer {layer} is negative; layers count from 0", reason="UNKNOWN_LAYER")
    if layer > MAX_LAYER_INDEX:
        raise InvalidRequest(f"layer {layer} is outside 0..{MAX_LAYER_INDEX}", reason="UNKNOWN_LAYER")


@dataclass(frozen=True, slots=True)
class MessageBoundary:
    """Where one chat message lies among the prompt's tokens; a message's template header belongs to it."""

    role: str
    """Who spoke."""
    content: str
    """What was said."""
    start_token: int
    """Position of its first token."""
    end_token: int
    """Position after its last token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this message, template included."""
        return self.end_token - self.start_token


class CaptureHandle:
    """The captured hidden states of one output; `async with` closes it, `fetch` brings the data."""

    def __init__(
        self,
        *,
        request_id: str,
        layer_indices: Sequence[int],
        fetch: Callable[[], Awaitable[Mapping[int, npt.NDArray[Any]]]],
        release: Callable[[], Awaitable[None]] | None = None,
        message_boundaries: Sequence[MessageBoundary] | None = None,
    ) -> None:
        self.request_id = request_id
        """The request that was captured."""
        self.layer_indices = tuple(layer_indices)
        """Layers captured, in the order asked for."""
        self.message_boundaries = tuple(message_boundaries) if message_boundaries is not None else None
        """Where each message of a chat lies; None if the prompt was not a chat."""
        self._fetch = fetch
        self._release = release
        self._captures: Captures | None = None
        self._fetching = asyncio.Lock()
        self._closed = False

    async def fetch(self) -> Captures:
        """Brings the data here once and returns it; later calls, and those meanwhile, return the same."""
        async with self._fetching:
            if self._captures is None:
                arrays = await self._fetch()
                self._captures = {layer: [{"hidden": arrays[layer]}] for layer in self.layer_indices}
            return self._captures

    @property
    def captures(self) -> Captures:
        """`captures[layer][0]["hidden"]`: [rows, hidden_size] in the model's dtype; RuntimeError before `fetch`."""
        if self._captures is None:
            raise RuntimeError(f"Captures not fetched yet for request {self.request_id}. Call: await handle.fetch()")
        return self._captures

    def get_message_activations(
        self, message_idx: int, layer_idx: int, *, include_generated: bool = False
    ) -> npt.NDArray[Any]:
        """Rows of one chat message at one layer, shape [tokens, hidden_size].

        `include_generated` extends the last message to the end of the sequence. Raises RuntimeError before `fetch` or
        for a prompt that was not a chat, ValueError for an unknown message or layer.
        """
        captures = self.captures
        if self.message_boundaries is None:
            raise RuntimeError(
                "Message boundaries not available for this capture. This handle was not created from a chat() call."
            )
        count = len(self.message_boundaries)
        if not 0 <= message_idx < count:
            raise ValueError(f"message_idx {message_idx} out of range [0, {count})")
        if layer_idx not in captures:
            raise ValueError(f"layer_idx {layer_idx} not in captured layers: {list(self.layer_indices)}")
        boundary = self.message_boundaries[message_idx]
        to_the_end = include_generated and message_idx == count - 1
        end = None if to_the_end else boundary.end_token
        return captures[layer_idx][0]["hidden"][boundary.start_token : end]

    async def close(self) -> None:
        """Lets the server free what it holds; data already fetched stays. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._release is None:
            return
        try:
            await self._release()
        except BaseException:
            self._closed = False  # it may be closed again
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if self._release is not None and not self._closed:
            warnings.warn(f"the captures of request {self.request_id} were never closed", ResourceWarning, stacklevel=2)
