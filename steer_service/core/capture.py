"""Which hidden states to return, and the handle through which a caller reads them."""

import enum
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from steer_service.core.errors import InvalidRequest

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
        layers = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
        for index, layer in enumerate(layers):
            if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
                raise InvalidRequest(f"layer {layer!r} is not an integer", field=f"layers[{index}]")
            if layer < 0:
                raise InvalidRequest(
                    f"layer {layer} is negative; layers count from 0", reason="UNKNOWN_LAYER", field=f"layers[{index}]"
                )
        object.__setattr__(self, "layers", tuple(dict.fromkeys(int(layer) for layer in layers)))
        if self.max_chunk_bytes is not None and not 4096 <= self.max_chunk_bytes <= 1 << 20:
            raise InvalidRequest(
                f"{self.max_chunk_bytes} is outside 4096..1048576", reason="OUT_OF_RANGE", field="max_chunk_bytes"
            )


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
        self._closed = False

    async def fetch(self) -> Captures:
        """Brings the data here once and returns it; later calls return the same."""
        if self._captures is None:
            arrays = await self._fetch()
            self._captures = {layer: [{"hidden": arrays[layer]}] for layer in self.layer_indices}
        return self._captures

    @property
    def captures(self) -> Captures:
        """`captures[layer][0]["hidden"]`: shape [rows, hidden_size], model dtype; raises RuntimeError before `fetch`."""
        if self._captures is None:
            raise RuntimeError(
                f"Captures not fetched yet for request {self.request_id}. Call: await handle.fetch()"
            )
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
                "Message boundaries not available for this capture. "
                "This handle was not created from a chat() call."
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
        if self._release is not None:
            await self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if self._release is not None and not self._closed:
            warnings.warn(
                f"the captures of request {self.request_id} were never closed", ResourceWarning, stacklevel=2
            )
