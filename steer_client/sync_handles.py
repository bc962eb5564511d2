"""SyncCaptureHandle: the handle of captures for programs without an event loop."""

from collections.abc import Coroutine, Iterable
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from steer_service.core.arrays import Float32Array, HiddenArray
from steer_service.core.capture import CapturedRows, Captures, MessageBoundary, Pooling, TorchCaptures
from steer_service.core.positions import Positions
from steer_service.core.stored_capture import Progress
from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.runtime.handle import CaptureHandle, Framework, NumpyFramework
from steer_service.runtime.process_bound import BoundCapture

Result = TypeVar("Result")


class SyncCaptureHandle(BoundCapture):
    """The captured hidden states of one output: `fetch` gets the data, `with` closes the handle."""

    def __init__(self, handle: CaptureHandle, loop: EventLoopThread) -> None:
        self._handle = handle
        self._loop = loop
        self._fetched = False

    @property
    def request_id(self) -> str:
        """Id of the request that was captured."""
        return self._handle.request_id

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Layers captured, in the order asked for."""
        return self._handle.layer_indices

    @property
    def message_boundaries(self) -> tuple[MessageBoundary, ...] | None:
        """The tokens of each message of a chat; None if the prompt was not a chat."""
        return self._handle.message_boundaries

    @property
    def boundaries_missing_reason(self) -> str:
        """Why the tokens of each message of a chat are not known, a sentence; "" if they are."""
        return self._handle.boundaries_missing_reason

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self._handle.total_bytes

    @property
    def pooling(self) -> Pooling:
        """Whether there is one row for all positions."""
        return self._handle.pooling

    @overload
    def fetch(
        self, *, framework: NumpyFramework = "numpy", progress: Progress | None = None, timeout_s: float | None = None
    ) -> Captures: ...

    @overload
    def fetch(
        self, *, framework: Literal["torch"], progress: Progress | None = None, timeout_s: float | None = None
    ) -> TorchCaptures: ...

    @overload
    def fetch(
        self, *, framework: Framework, progress: Progress | None = None, timeout_s: float | None = None
    ) -> Captures | TorchCaptures: ...

    def fetch(
        self, *, framework: Framework = "numpy", progress: Progress | None = None, timeout_s: float | None = None
    ) -> Captures | TorchCaptures:
        """Fetches the data once and returns it; later calls return the same rows. See CaptureHandle.fetch."""
        captures = self._run(self._handle.fetch(framework=framework, progress=progress, timeout_s=timeout_s))
        self._fetched = True
        return captures

    def fetch_rows(
        self,
        *,
        layers: Iterable[int] | None = None,
        positions: Positions | None = None,
        framework: NumpyFramework = "numpy",
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> CapturedRows:
        """The rows of chosen layers and positions, with their labels; see CaptureHandle.fetch_rows."""
        return self._run(
            self._handle.fetch_rows(
                layers=layers, positions=positions, framework=framework, progress=progress, timeout_s=timeout_s
            )
        )

    def matrix(self, layer: int) -> Float32Array:
        """The rows of one layer as float32, shape [rows, hidden_size]; see CaptureHandle.matrix."""
        _ = self.captures  # raises, and names the call, if nothing was fetched
        return self._handle.matrix(layer)

    @property
    def captures(self) -> Captures:
        """`captures[layer][0]["hidden"]`, shape [rows, hidden_size], and more; raises RuntimeError before `fetch`."""
        if not self._fetched:
            raise RuntimeError(f"Captures not fetched yet for request {self.request_id}. Call: handle.fetch()")
        return self._handle.captures

    def get_message_activations(
        self, message_idx: int, layer_idx: int, *, include_generated: bool = False
    ) -> HiddenArray:
        """Rows of one chat message at one layer, shape [rows, hidden_size]; see CaptureHandle."""
        _ = self.captures  # raises, and names the call, if nothing was fetched
        return self._handle.get_message_activations(message_idx, layer_idx, include_generated=include_generated)

    def close(self, *, timeout_s: float | None = None) -> None:
        """Releases the captures; data already fetched stays. Calling it again does nothing."""
        if self._loop.is_stopped:
            self._handle.mark_closed()  # a closed client has released everything
        else:
            self._loop.run(self._handle.close(timeout_s=timeout_s))

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs it in the client's loop, or in one of its own: after `close`, rows that are in this process stay."""
        if not self._loop.is_stopped:
            return self._loop.run(coroutine)
        own = EventLoopThread("steer-handle")
        try:
            return own.run(coroutine)
        finally:
            own.stop()

    def __repr__(self) -> str:
        return repr(self._handle).replace("<CaptureHandle", "<SyncCaptureHandle", 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
