"""Which hidden states to return, and the handle through which a caller reads them."""

import asyncio
import enum
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import dtype_from_name, name_of_dtype
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.positions import OPEN_END, PositionScope, Spans, positions_of, scope_from
from steer_service.core.specs import MAX_LAYER_INDEX

Captures = dict[int, list[dict[str, Any]]]
"""Layer -> a list of one dict, the shape steerllm users know.

`hidden` holds the rows, shape [rows, hidden_size]: after steering, or before it if only that was captured; `after` and
`before` are the same arrays by name, as far as captured; `meta` is the RowLabels of the rows, if the backend sent them.
"""


class CaptureSite(enum.Enum):
    """Where, relative to this request's own steering of a layer, its stream is read."""

    AFTER = "after"
    """After steering: what the next layer sees."""
    BEFORE = "before"
    """Before steering."""
    BOTH = "both"
    """Both of them; never the site of rows that were captured."""

    @property
    def parts(self) -> "tuple[CaptureSite, ...]":
        """The sites to read, each once."""
        return (CaptureSite.BEFORE, CaptureSite.AFTER) if self is CaptureSite.BOTH else (self,)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """Which layers' residual streams to return, and at which rows: all are prompt tokens + generated tokens - 1."""

    layers: tuple[int, ...]
    """Layer indices, 0-based; duplicates count once, the order is kept."""
    site: CaptureSite = CaptureSite.AFTER
    """After steering, before it, or both."""
    positions: PositionScope | None = None
    """The rows to return, in any form that `scope_from` takes. Default: all, of the prompt and generated."""
    dtype: str | None = None
    """Element type to return: `float32`, or the model's own. Default: the model's."""
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
        with within("positions"):
            object.__setattr__(self, "positions", scope_from(self.positions))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        self._check_chunk()

    def _check_chunk(self) -> None:
        size = self.max_chunk_bytes
        if size is None:
            return
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 4096 <= size <= 1 << 20:
            raise InvalidRequest(f"{size!r} is outside 4096..1048576", reason="OUT_OF_RANGE", field="max_chunk_bytes")
        object.__setattr__(self, "max_chunk_bytes", int(size))


def _dtype_name(name: Any) -> str:
    if not isinstance(name, str):
        raise InvalidRequest(f"{name!r} is not the name of a dtype", reason="UNKNOWN_DTYPE", field="dtype")
    return name_of_dtype(dtype_from_name(name))


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowLabels:
    """Where captured rows belong, one number per row in each array; any sequences of one length are taken."""

    positions: npt.NDArray[np.int32]
    """Position in the sequence, ascending; the first prompt token has position 0."""
    token_ids: npt.NDArray[np.int32]
    """The token that was fed to the model there."""
    is_generated: npt.NDArray[np.bool_]
    """False for a token of the prompt."""
    is_steered: npt.NDArray[np.bool_]
    """True if the row went through the steering program of its request."""

    def __post_init__(self) -> None:
        for name in ("positions", "token_ids"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int32))
        for name in ("is_generated", "is_steered"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.bool_))
        shapes = {array.shape for array in self._arrays()}
        if len(shapes) > 1 or self.positions.ndim != 1:
            raise InvalidRequest(f"labels are parallel arrays, got shapes {sorted(shapes)}", reason="BAD_SHAPE")

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(
            positions=self.positions[rows],
            token_ids=self.token_ids[rows],
            is_generated=self.is_generated[rows],
            is_steered=self.is_steered[rows],
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowLabels):
            return NotImplemented
        return all(np.array_equal(*pair) for pair in zip(self._arrays(), other._arrays(), strict=True))

    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return self.positions, self.token_ids, self.is_generated, self.is_steered

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The labels of all `parts`, at least one, one after the other."""
        columns = zip(*(part._arrays() for part in parts), strict=True)
        positions, token_ids, is_generated, is_steered = map(np.concatenate, columns)
        return cls(positions=positions, token_ids=token_ids, is_generated=is_generated, is_steered=is_steered)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapturedRows:
    """Everything that was captured of one output; every array has the same rows, shape [rows, hidden_size]."""

    before: Mapping[int, npt.NDArray[Any]] = field(default_factory=dict)
    """Layer -> its rows before steering, if captured."""
    after: Mapping[int, npt.NDArray[Any]] = field(default_factory=dict)
    """Layer -> its rows after steering, if captured."""
    spans: Spans = ()
    """Positions of the rows."""
    labels: RowLabels | None = None
    """What the backend says of the rows, if it does."""

    @property
    def hidden(self) -> Mapping[int, npt.NDArray[Any]]:
        """Layer -> its rows after steering, or before if only that was captured."""
        return self.after or self.before

    def as_captures(self, layers: Iterable[int]) -> Captures:
        """The same arrays in the shape users know, in the order of `layers`."""
        return {layer: [self._entry(layer)] for layer in layers}

    def _entry(self, layer: int) -> dict[str, Any]:
        named = {"hidden": self.hidden[layer]}
        named |= {"before": self.before[layer]} if layer in self.before else {}
        named |= {"after": self.after[layer]} if layer in self.after else {}
        return named if self.labels is None else {**named, "meta": self.labels}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CapturedRows):
            return NotImplemented
        sites = ((self.before, other.before), (self.after, other.after))
        return (self.spans, self.labels) == (other.spans, other.labels) and all(
            mine.keys() == theirs.keys() and all(np.array_equal(mine[layer], theirs[layer]) for layer in mine)
            for mine, theirs in sites
        )

    def rows_between(self, first: int, end: int) -> slice:
        """The rows at positions first..end-1, which lie together."""
        positions = positions_of(self.spans)
        return slice(*np.searchsorted(positions, (first, end)).tolist())


class CaptureHandle:
    """The captured hidden states of one output; `async with` closes it, `fetch` brings the data."""

    def __init__(
        self,
        *,
        request_id: str,
        layer_indices: Sequence[int],
        fetch: Callable[[], Awaitable[CapturedRows]],
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
        self._rows: CapturedRows | None = None
        self._captures: Captures | None = None
        self._fetching = asyncio.Lock()
        self._closed = False

    async def fetch(self) -> Captures:
        """Brings the data here once and returns it; later calls, and those meanwhile, return the same."""
        async with self._fetching:
            if self._captures is None:
                self._rows = await self._fetch()
                self._captures = self._rows.as_captures(self.layer_indices)
            return self._captures

    @property
    def captures(self) -> Captures:
        """`captures[layer][0]["hidden"]`, shape [rows, hidden_size], and more: see Captures.

        Raises RuntimeError before `fetch`.
        """
        if self._captures is None:
            raise RuntimeError(f"Captures not fetched yet for request {self.request_id}. Call: await handle.fetch()")
        return self._captures

    def get_message_activations(
        self, message_idx: int, layer_idx: int, *, include_generated: bool = False
    ) -> npt.NDArray[Any]:
        """Rows of one chat message at one layer, as far as they were captured, shape [rows, hidden_size].

        `include_generated` extends the last message to the end of the sequence. Raises RuntimeError before `fetch` or
        for a prompt that was not a chat, ValueError for an unknown message or layer, or for a message of which no row
        was captured.
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
        end = OPEN_END if to_the_end else boundary.end_token
        assert self._rows is not None, "captures are there"
        rows = self._rows.rows_between(boundary.start_token, end)
        if rows.start == rows.stop and boundary.num_tokens:
            raise ValueError(
                f"no row of message {message_idx} was captured; it has positions {boundary.start_token} to "
                f"{boundary.end_token - 1}"
            )
        hidden: npt.NDArray[Any] = captures[layer_idx][0]["hidden"][rows]
        return hidden

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
