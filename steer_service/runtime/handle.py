"""The handle through which a caller fetches and releases the captures of one output."""

import asyncio
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self, cast, get_args, overload

from steer_service.core.arrays import Float32Array, HiddenArray, Tensor, as_torch
from steer_service.core.capture import (
    CapturedRows,
    CaptureEntry,
    Captures,
    MessageBoundary,
    Pooling,
    RowLabels,
    TorchCaptures,
    check_choosable,
    chosen_layers,
)
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.positions import Positions, scope_from
from steer_service.core.spans import OPEN_END
from steer_service.core.stored_capture import HeldCapture, Progress
from steer_service.runtime.deadline import call_deadline
from steer_service.runtime.process_bound import BoundCapture
from steer_service.runtime.together import together

Framework = Literal["numpy", "native", "torch"]
"""What arrays are: `numpy` is float32, whatever dtype travelled; `native` and `torch` are views of what travelled.

Native bfloat16 arrays use ml_dtypes. Their sums round to bfloat16 at every step, so a mean of many rows is wrong.
"""

NumpyFramework = Literal["numpy", "native"]
"""The frameworks that are NumPy arrays."""

FETCHES_AT_ONCE = 4
"""Held captures that `fetch_all` fetches at a time: one response stream cannot fill a connection, a few can."""


class CaptureHandle(BoundCapture):
    """The captured hidden states of one output: `fetch` gets the data, `async with` closes the handle.

    Calls with captures return one for each output. The data came with the response, or is in shared memory or on the
    server until the handle is closed.
    """

    def __init__(
        self,
        *,
        request_id: str,
        layer_indices: Sequence[int],
        held: HeldCapture,
        labels: RowLabels | None = None,
        message_boundaries: Sequence[MessageBoundary] | None = None,
        boundaries_missing_reason: str = "",
    ) -> None:
        self.request_id = request_id
        """Id of the request that was captured."""
        self.layer_indices = tuple(layer_indices)
        """Layers captured, in the order asked for."""
        self.message_boundaries = tuple(message_boundaries) if message_boundaries is not None else None
        """The tokens of each message of a chat; empty if they are not known; None if the prompt was no chat."""
        self.boundaries_missing_reason = boundaries_missing_reason
        """Why the tokens of each message of a chat are not known, a sentence; "" if they are."""
        self._held = held
        self._labels = labels
        self._rows: CapturedRows | None = None
        self._captures: Captures | TorchCaptures | None = None
        self._framework: Framework | None = None
        self._fetching = asyncio.Lock()
        self._process = os.getpid()
        self._closed = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self._held.metadata.total_bytes

    @property
    def pooling(self) -> Pooling:
        """Whether there is one row for all positions."""
        return self._held.metadata.pooling

    @overload
    async def fetch(
        self, *, framework: NumpyFramework = "numpy", progress: Progress | None = None, timeout_s: float | None = None
    ) -> Captures: ...

    @overload
    async def fetch(
        self, *, framework: Literal["torch"], progress: Progress | None = None, timeout_s: float | None = None
    ) -> TorchCaptures: ...

    @overload
    async def fetch(
        self, *, framework: Framework, progress: Progress | None = None, timeout_s: float | None = None
    ) -> Captures | TorchCaptures: ...

    async def fetch(
        self, *, framework: Framework = "numpy", progress: Progress | None = None, timeout_s: float | None = None
    ) -> Captures | TorchCaptures:
        """Fetches the data once and returns it; later and concurrent calls return the same rows.

        Shared memory is mapped and not copied. `framework` chooses what the entries hold from now on: float32 arrays,
        each made when its layer is first read, or views of what travelled (`native`, `torch`). `progress` is called
        with (bytes received, total bytes). Raises NotFound if the rows were released or have expired, and
        DeadlineExceeded after `timeout_s` (default: the client's).
        """
        if self._is_inherited:
            self._fetching = asyncio.Lock()  # a thread of the parent may have held the other one
        async with call_deadline(timeout_s, "fetch"), self._fetching:
            if self._rows is None:
                self._rows = replace(await self._held.rows(progress=progress), labels=self._labels)
            if self._captures is None or framework != self._framework:
                self._captures = _as_framework(self._rows, self.layer_indices, framework)
                self._framework = framework
            return self._captures

    async def fetch_rows(
        self,
        *,
        layers: Iterable[int] | None = None,
        positions: Positions | None = None,
        framework: NumpyFramework = "numpy",
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> CapturedRows:
        """The rows of chosen layers and positions, with their labels; only these are transferred, and none is cached.

        `positions` in any form that `PositionScope` names. Arrays are float32, made when a layer is first read; with
        `framework="native"` they are what travelled. Raises InvalidRequest for rows that were not captured, NotFound
        if they were released or have expired.
        """
        if framework not in get_args(NumpyFramework):
            raise InvalidRequest(f"{framework!r} is neither 'numpy' nor 'native'", field="framework")
        with within("positions"):
            scope = scope_from(positions)
        async with call_deadline(timeout_s, "fetch_rows"):
            rows = await self._held.rows(None if layers is None else tuple(layers), scope, progress)
        rows = replace(rows, labels=self._labels.at(rows.spans) if self._labels is not None else None)
        return rows.as_float32() if framework == "numpy" else rows

    def matrix(self, layer: int) -> Float32Array:
        """The rows of this output at one layer as float32, shape [rows, hidden_size], whatever framework was fetched.

        It is what scikit-learn takes; `np.concatenate([handle.matrix(5) for handle in handles])` joins several
        outputs. After steering, or before it if only that was captured. Raises RuntimeError before `fetch` and
        InvalidRequest for a layer that was not captured.
        """
        _ = self.captures  # raises, and names the call, if nothing was fetched
        assert self._rows is not None, "captures are there"
        chosen_layers(self.layer_indices, [layer])
        return self._rows.as_float32().hidden[layer]

    @property
    def captures(self) -> Captures:
        """`captures[layer][0]["hidden"]`, shape [rows, hidden_size], and more: see CaptureEntry.

        The entries hold torch tensors after `fetch(framework="torch")`, although the type says NumPy arrays; what
        that call returns has the exact type. Raises RuntimeError before `fetch`.
        """
        if self._captures is None:
            raise RuntimeError(f"Captures not fetched yet for request {self.request_id}. Call: await handle.fetch()")
        return cast(Captures, self._captures)

    def get_message_activations(
        self, message_idx: int, layer_idx: int, *, include_generated: bool = False
    ) -> HiddenArray:
        """The captured rows of the text of one chat message at one layer, shape [rows, hidden_size].

        What the chat template adds belongs to no message. `include_generated` extends the last message to the end of
        the sequence. Raises RuntimeError before `fetch`, for a prompt that was not a chat, and for a chat whose
        messages have no known places. Raises ValueError for an unknown message or layer, for a message none of
        whose rows was captured, and for pooled rows.
        """
        captures = self.captures
        check_choosable(self.pooling, message_idx)
        if self.message_boundaries is None:
            raise RuntimeError(
                "Message boundaries not available for this capture. This handle was not created from a chat() call."
            )
        if not self.message_boundaries:
            reason = self.boundaries_missing_reason or "the server did not say why"
            raise RuntimeError(
                f"Message boundaries not available for this capture: {reason}. Choose rows by their positions."
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
        return captures[layer_idx][0]["hidden"][rows]

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Releases the captures; data already fetched stays. Calling it again does nothing.

        In a forked process it does nothing at all: the captures are the parent's. Raises DeadlineExceeded after
        `timeout_s` (default: the client's `unary_timeout_s`); it may be called again.
        """
        if self._closed or self._is_inherited:
            return
        self._closed = True
        try:
            async with call_deadline(timeout_s, "close"):
                await self._held.release()
        except BaseException:
            self._closed = False  # close may be called again
            raise

    @property
    def _is_inherited(self) -> bool:
        """True in a process that was forked after the handle was made."""
        return os.getpid() != self._process

    def mark_closed(self) -> None:
        """Counts the handle as closed without a call: its rows were released some other way."""
        self._closed = True

    def __repr__(self) -> str:
        layers = f"{len(self.layer_indices)} layers" if len(self.layer_indices) > 4 else f"layers {self.layer_indices}"
        state = "closed" if self._closed else "open" if self._rows is None else "fetched"
        return f"<CaptureHandle of request {self.request_id[:32]!r}, {layers}, {self.total_bytes} bytes, {state}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if not self._closed and self._held.holds_memory and not self._is_inherited:
            self._held.release_nowait()
            warnings.warn(f"the captures of request {self.request_id} were never closed", ResourceWarning, stacklevel=2)


@overload
async def fetch_all(
    handles: Sequence[CaptureHandle],
    *,
    framework: NumpyFramework = "numpy",
    progress: Progress | None = None,
    timeout_s: float | None = None,
) -> list[Captures]: ...


@overload
async def fetch_all(
    handles: Sequence[CaptureHandle],
    *,
    framework: Literal["torch"],
    progress: Progress | None = None,
    timeout_s: float | None = None,
) -> list[TorchCaptures]: ...


@overload
async def fetch_all(
    handles: Sequence[CaptureHandle],
    *,
    framework: Framework,
    progress: Progress | None = None,
    timeout_s: float | None = None,
) -> list[Captures] | list[TorchCaptures]: ...


async def fetch_all(
    handles: Sequence[CaptureHandle],
    *,
    framework: Framework = "numpy",
    progress: Progress | None = None,
    timeout_s: float | None = None,
) -> list[Captures] | list[TorchCaptures]:
    """Fetches several handles, a few at a time; `progress` is called with the sums of their bytes.

    Raises InvalidRequest for None, which is in the place of the handle of a prompt that failed.
    """
    check_handles(handles)
    total, done = sum(handle.total_bytes for handle in handles), [0] * len(handles)
    room = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def one(index: int) -> Captures | TorchCaptures:
        def note(here: int, _: int) -> None:
            done[index] = here
            if progress is not None:
                progress(sum(done), total)

        async with room:
            return await handles[index].fetch(framework=framework, progress=note)

    async with call_deadline(timeout_s, "fetch_all"):
        return await together(one(index) for index in range(len(handles)))


def check_handles(handles: Sequence[object]) -> None:
    """Raises InvalidRequest (`handles[i]`) for None among handles."""
    for index, handle in enumerate(handles):
        if handle is None:
            raise InvalidRequest(
                "it is None, because its prompt failed; leave it out: [handle for handle in handles if handle]",
                field=f"handles[{index}]",
            )


def _as_framework(rows: CapturedRows, layers: Sequence[int], framework: Framework) -> Captures | TorchCaptures:
    match framework:
        case "numpy":
            return rows.as_float32().as_captures(layers)
        case "native":
            return rows.as_captures(layers)
        case "torch":
            return {
                layer: [_torch_entry(entry) for entry in entries] for layer, entries in rows.as_captures(layers).items()
            }
    raise InvalidRequest(f"{framework!r} is not 'numpy', 'native' or 'torch'", field="framework")


def _torch_entry(entry: CaptureEntry[HiddenArray]) -> CaptureEntry[Tensor]:
    tensors: CaptureEntry[Tensor] = {"hidden": as_torch(entry["hidden"])}
    if "before" in entry:
        tensors["before"] = as_torch(entry["before"])
    if "after" in entry:
        tensors["after"] = as_torch(entry["after"])
    if "meta" in entry:
        tensors["meta"] = entry["meta"]
    return tensors
