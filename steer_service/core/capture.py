"""Which hidden states to return and how, and the captured rows with their labels."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NotRequired, Self, TypedDict, TypeVar, overload

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import HiddenArray, Tensor, as_float32, dtype_from_name, name_of_dtype
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_layer
from steer_service.core.hook_point import HookPoint, hook_point
from steer_service.core.lazy_mapping import LazyMapping
from steer_service.core.one_line import one_line
from steer_service.core.positions import PositionScope, scope_from
from steer_service.core.spans import Spans, positions_of

Array = TypeVar("Array")
"""A NumPy array or a torch tensor."""


class CaptureSite(enum.Enum):
    """Where the residual stream after a layer is read: before or after this request's own steering of that layer."""

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


class Pooling(enum.Enum):
    """How the captured rows of an output become one row for each layer and site."""

    NONE = "none"
    """They do not: every row is returned."""
    MEAN = "mean"
    """Their mean, as float32 whatever dtype was recorded: summed in float64 and rounded once."""
    LAST = "last"
    """The row at the last of their positions."""
    MAX = "max"
    """Their largest value in each element; NaN if one of them is."""

    def row_count(self, rows: int) -> int:
        """The number of rows that are returned of so many captured ones."""
        return rows if self is Pooling.NONE else min(rows, 1)

    @overload
    def dtype_of(self, recorded: str) -> str: ...

    @overload
    def dtype_of(self, recorded: str | None) -> str | None: ...

    def dtype_of(self, recorded: str | None) -> str | None:
        """The dtype of what is returned of rows that were recorded in another."""
        return "float32" if self is Pooling.MEAN else recorded


class CaptureDelivery(enum.Enum):
    """How captured rows reach the caller."""

    INLINE = "inline"
    """With the response."""
    HELD = "held"
    """Kept where they were captured until they are fetched, are released or expire."""
    SHARED_MEMORY_PREFERRED = "shared_memory_preferred"
    """Through memory that caller and server share; if they share none, inline, and the response has the reason."""
    SHARED_MEMORY_REQUIRED = "shared_memory_required"
    """Through memory that caller and server share; if they share none, the request is refused."""

    @property
    def is_shared(self) -> bool:
        """True if shared memory is asked for."""
        return self in (CaptureDelivery.SHARED_MEMORY_PREFERRED, CaptureDelivery.SHARED_MEMORY_REQUIRED)

    @property
    def in_process(self) -> "CaptureDelivery":
        """The delivery to a caller in the process that captures: they always share memory."""
        return CaptureDelivery.SHARED_MEMORY_REQUIRED if self.is_shared else self


class SharedMemoryFallback(enum.Enum):
    """Why captures with SHARED_MEMORY_PREFERRED are delivered inline."""

    NO_SESSION = "no session"
    """The request had no session token: the client has not proven that it shares the server's memory."""
    SESSION_ENDED = "session ended"
    """Its session is unknown, has ended, or belongs to another client."""
    SWITCHED_OFF = "switched off"
    """The server offers no shared memory."""
    OTHER_INSTANCE = "other instance"
    """The session is one of another server behind the same balancer."""


RELEASE_TOKEN_BYTES = range(16, 65)
"""Permitted lengths of a release token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """After which layers to return the residual stream, and at which positions; raises InvalidRequest for a bad field.

    A request has prompt tokens + generated tokens - 1 rows: the last sampled token is never fed to the model. With
    `max_tokens=0` it has those of the prompt.
    """

    layers: tuple[int, ...]
    """Layer indices, 0-based; duplicates count once, the order is kept."""
    site: CaptureSite = CaptureSite.AFTER
    """After steering, before it, or both."""
    positions: PositionScope | None = None
    """Positions to return, in any form that `PositionScope` names. Default: all, of the prompt and generated."""
    dtype: str | None = None
    """Dtype to return: `float32`, or the model's own. Default: the model's."""
    max_chunk_bytes: int | None = None
    """Most bytes of one chunk on the wire, 4 KiB..1 MiB. Default 256 KiB."""
    delivery: CaptureDelivery = CaptureDelivery.INLINE
    """How the rows are delivered; also by value, such as "held". An in-process engine treats all but INLINE alike."""
    is_live: bool = False
    """True: rows are delivered soon after their tokens, in many blocks, not after the last token. INLINE only."""
    pooling: Pooling = Pooling.NONE
    """One row in place of all, for each layer and site; also by value, such as "mean". Not for a live capture."""
    shared_memory_session: bytes = field(default=b"", repr=False)
    """Proof that the caller shares the server's memory; the client fills it in automatically."""
    release_token: bytes = field(default=b"", repr=False)
    """Frees everything the request stored on the server, 16..64 bytes; the client fills it in automatically."""
    hook: HookPoint = HookPoint.RESIDUAL_STREAM
    """What is captured at these layers; also by value, "residual_stream"."""

    __repr__ = one_line

    def __post_init__(self) -> None:
        object.__setattr__(self, "hook", hook_point(self.hook))
        layers = _layer_numbers(self.layers)
        for index, layer in enumerate(layers):
            with within(f"layers[{index}]"):
                check_layer(layer)
        object.__setattr__(self, "layers", tuple(dict.fromkeys(int(layer) for layer in layers)))
        if not isinstance(self.site, CaptureSite):
            raise InvalidRequest(f"{self.site!r} is not a CaptureSite", reason="BAD_SITE", field="site")
        with within("positions"):
            object.__setattr__(self, "positions", scope_from(self.positions))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if self.max_chunk_bytes is not None:
            object.__setattr__(self, "max_chunk_bytes", check_chunk_bytes(self.max_chunk_bytes))
        self._check_delivery()

    def _check_delivery(self) -> None:
        for name, kind in (("delivery", CaptureDelivery), ("pooling", Pooling)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                known = ", ".join(one.value for one in kind)
                raise InvalidRequest(
                    f"{value!r} is not one of {known}", reason=f"BAD_{name.upper()}", field=name
                ) from None
        if not isinstance(self.is_live, bool):
            raise InvalidRequest(f"{self.is_live!r} is not True or False", field="is_live")
        if self.is_live and self.pooling is not Pooling.NONE:
            raise InvalidRequest(
                "the pooled row is known after the last token, and a live capture sends rows before",
                reason="BAD_POOLING",
                field="pooling",
            )
        if self.is_live and self.delivery is not CaptureDelivery.INLINE:
            raise InvalidRequest(
                f"live captures are inline, not {self.delivery.value}", reason="BAD_DELIVERY", field="is_live"
            )
        if not isinstance(self.shared_memory_session, bytes):
            raise InvalidRequest("a session token is bytes", field="shared_memory_session")
        if self.release_token != b"":
            check_release_token(self.release_token)


def check_release_token(token: Any) -> None:
    """Raises InvalidRequest for what cannot be a release token."""
    if not isinstance(token, bytes) or len(token) not in RELEASE_TOKEN_BYTES:
        raise InvalidRequest("a release token is 16..64 bytes", reason="OUT_OF_RANGE", field="release_token")


def check_chunk_bytes(size: Any) -> int:
    """`size` as the size of a chunk; raises InvalidRequest if it cannot be one."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 4096 <= size <= 1 << 20:
        raise InvalidRequest(f"{size!r} is outside 4096..1048576", reason="OUT_OF_RANGE", field="max_chunk_bytes")
    return int(size)


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


@dataclass(frozen=True, slots=True)
class MessageBoundary:
    """The tokens of the text of one chat message in the prompt.

    That is its reasoning, its content, and the names and arguments of its calls, from the first to the last of them.
    What the chat template adds, such as headers, end markers and a default system prompt, belongs to no message.
    """

    role: str
    """The author, such as `user`."""
    content: str
    """The text of the message."""
    start_token: int
    """Position of its first token."""
    end_token: int
    """Position after its last token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this message; 0 for one without text."""
        return self.end_token - self.start_token


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowLabels:
    """The token and the position of each captured row, shape [rows] in each array; any equally long sequences do."""

    positions: npt.NDArray[np.int32]
    """Position in the sequence, ascending; the first prompt token has position 0."""
    token_ids: npt.NDArray[np.int32]
    """Token that was fed to the model at the position."""
    is_generated: npt.NDArray[np.bool_]
    """False for a token of the prompt."""
    is_steered: npt.NDArray[np.bool_]
    """True if the steering program of the request was applied to the row."""

    __repr__ = one_line

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

    def __getitem__(self, rows: slice | npt.NDArray[np.intp]) -> Self:
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

    def at(self, spans: Spans) -> Self:
        """The labels of the rows at these positions, all of which must have labels."""
        return self[self.positions.searchsorted(positions_of(spans))]

    @classmethod
    def of(cls, spans: Spans, token_ids: Sequence[int], prompt_tokens: int, is_steered: npt.NDArray[np.bool_]) -> Self:
        """The labels of the rows at `spans` of an output; none of the spans is open.

        `token_ids` are prompt and generated tokens; `is_steered`, shape [rows of the output], is True where the
        program was applied.
        """
        positions = positions_of(spans)
        return cls(
            positions=positions,
            token_ids=np.array(token_ids, dtype=np.int32)[positions],
            is_generated=positions >= prompt_tokens,
            is_steered=is_steered[positions],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The labels of all `parts`, at least one, one after the other."""
        columns = zip(*(part._arrays() for part in parts), strict=True)
        positions, token_ids, is_generated, is_steered = map(np.concatenate, columns)
        return cls(positions=positions, token_ids=token_ids, is_generated=is_generated, is_steered=is_steered)


class CaptureEntry(TypedDict, Generic[Array]):
    """The rows of one layer, in the form of the in-process steerllm."""

    hidden: Array
    """Shape [rows, hidden_size]: after steering, or before it if only that was captured."""
    before: NotRequired[Array]
    """The rows before steering, if captured."""
    after: NotRequired[Array]
    """The rows after steering, if captured."""
    meta: NotRequired[RowLabels]
    """The labels of the rows, if the backend sent them."""


Captures = Mapping[int, list[CaptureEntry[HiddenArray]]]
"""Layer -> a list of one entry, made when it is first read: `captures[layer][0]["hidden"]`."""

TorchCaptures = Mapping[int, list[CaptureEntry[Tensor]]]
"""The same with torch tensors."""


def check_choosable(pooling: Pooling, positions: object) -> None:
    """Raises InvalidRequest if `positions` are chosen of pooled rows."""
    if positions is not None and pooling is not Pooling.NONE:
        raise InvalidRequest(
            f"the rows were pooled ({pooling.value}): there is one for all positions",
            reason="NOT_CAPTURED",
            field="positions",
        )


def chosen_layers(captured: Iterable[int], wanted: Iterable[int] | None) -> tuple[int, ...]:
    """The requested layers, each once; None means all that were captured.

    Raises InvalidRequest for a layer that was not captured.
    """
    known = tuple(captured)
    chosen = known if wanted is None else tuple(wanted)
    for index, layer in enumerate(chosen):
        if layer not in known:
            raise InvalidRequest(
                f"layer {layer} was not captured; {sorted(known)} were", reason="NOT_CAPTURED", field=f"layers[{index}]"
            )
    return tuple(dict.fromkeys(chosen))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapturedRows:
    """All captured rows of one output; every array has the same rows, shape [rows, hidden_size]."""

    before: Mapping[int, HiddenArray] = field(default_factory=dict)
    """Layer -> its rows before steering, if captured."""
    after: Mapping[int, HiddenArray] = field(default_factory=dict)
    """Layer -> its rows after steering, if captured."""
    spans: Spans = ()
    """Positions of the rows; of pooled ones, those that the one row was made of."""
    labels: RowLabels | None = None
    """Labels of the rows, if the backend sent them; None for pooled rows."""
    pooling: Pooling = Pooling.NONE
    """Whether there is one row for all positions."""
    _float32: "CapturedRows | None" = field(default=None, init=False, repr=False)

    __repr__ = one_line

    @property
    def hidden(self) -> Mapping[int, HiddenArray]:
        """Layer -> its rows after steering, or before if only that was captured."""
        return self.after or self.before

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for arrays in (self.before, self.after) for array in arrays.values())

    def as_float32(self) -> "CapturedRows":
        """The same rows as float32, the same object in every call; a layer is converted when it is first read."""
        if self._float32 is None:
            before, after = self.before, self.after
            wide = CapturedRows(
                before=LazyMapping(before, lambda layer: as_float32(before[layer])),
                after=LazyMapping(after, lambda layer: as_float32(after[layer])),
                spans=self.spans,
                labels=self.labels,
                pooling=self.pooling,
            )
            object.__setattr__(self, "_float32", wide)
            return wide
        return self._float32

    def as_captures(self, layers: Iterable[int]) -> Captures:
        """The same arrays in the form of the in-process steerllm, in the order of `layers`."""
        return LazyMapping(layers, lambda layer: [self._entry(layer)])

    def _entry(self, layer: int) -> CaptureEntry[HiddenArray]:
        entry: CaptureEntry[HiddenArray] = {"hidden": self.hidden[layer]}
        if layer in self.before:
            entry["before"] = self.before[layer]
        if layer in self.after:
            entry["after"] = self.after[layer]
        if self.labels is not None:
            entry["meta"] = self.labels
        return entry

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CapturedRows):
            return NotImplemented
        sites = ((self.before, other.before), (self.after, other.after))
        facts = [(one.spans, one.labels, one.pooling) for one in (self, other)]
        return facts[0] == facts[1] and all(
            mine.keys() == theirs.keys() and all(np.array_equal(mine[layer], theirs[layer]) for layer in mine)
            for mine, theirs in sites
        )

    def select(self, layers: Iterable[int] | None = None, spans: Spans | None = None) -> "CapturedRows":
        """Part of the same arrays, not copied if its rows are contiguous; None selects all layers or rows.

        Raises InvalidRequest for a layer or a position that was not captured, and for positions of pooled rows.
        """
        check_choosable(self.pooling, spans)
        chosen = chosen_layers(self.hidden, layers)
        rows = slice(None) if spans is None else self._rows_at(spans)
        before, after = (
            {layer: arrays[layer][rows] for layer in chosen if layer in arrays} for arrays in (self.before, self.after)
        )
        labels = self.labels[rows] if self.labels is not None else None
        spans = self.spans if spans is None else spans
        return CapturedRows(before=before, after=after, spans=spans, labels=labels, pooling=self.pooling)

    def _rows_at(self, spans: Spans) -> slice | npt.NDArray[np.intp]:
        held, wanted = positions_of(self.spans), positions_of(spans)
        is_missing = ~np.isin(wanted, held, assume_unique=True)
        if is_missing.any():
            raise InvalidRequest(
                f"the row at position {wanted[is_missing.argmax()]} was not captured",
                reason="NOT_CAPTURED",
                field="positions",
            )
        rows = held.searchsorted(wanted)
        are_contiguous = len(rows) and rows[-1] - rows[0] == len(rows) - 1
        return slice(int(rows[0]), int(rows[-1]) + 1) if are_contiguous else rows

    def rows_between(self, first: int, end: int) -> slice:
        """The rows at positions first..end-1, which are contiguous."""
        positions = positions_of(self.spans)
        return slice(*np.searchsorted(positions, (first, end)).tolist())
