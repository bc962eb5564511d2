"""Copies from a device to the host while the device continues with other work; on a CPU a copy is made at once."""

from collections.abc import Sequence
from typing import Protocol

import torch

Copy = tuple[torch.Tensor, torch.Tensor]
"""Source on the device, target in the host's memory."""


class CopyEvent(Protocol):
    """Copies in flight."""

    def synchronize(self) -> None:
        """Waits until the copies are complete; any thread may call it, more than once."""


class CopyStream(Protocol):
    """Copies from one device to the host."""

    def pinned_buffer(self, size: int) -> torch.Tensor:
        """Host memory of `size` bytes, uint8, to which the device can copy while it does other work."""

    def send(self, first: Sequence[Copy], rest: Sequence[Copy]) -> CopyEvent:
        """Queues copies of the results of all work queued on the device so far.

        Work that is queued later waits for the copies of `first`, but not for those of `rest`. Before later work
        overwrites the sources of `rest`, call `make_device_wait_for`.
        """

    def make_device_wait_for(self, event: CopyEvent) -> None:
        """Makes work that is queued on the device from now on wait for these copies; the caller does not wait."""

    @property
    def is_recording(self) -> bool:
        """True while work is recorded in a CUDA graph instead of done."""


class CpuCopies:
    """The host is the device: every copy is complete when `send` returns."""

    def pinned_buffer(self, size: int) -> torch.Tensor:
        """Pageable memory of `size` bytes."""
        return torch.empty(size, dtype=torch.uint8)

    def send(self, first: Sequence[Copy], rest: Sequence[Copy]) -> CopyEvent:
        """Copies at once."""
        for source, target in (*first, *rest):
            target.copy_(source)
        return _DoneCopy()

    def make_device_wait_for(self, event: CopyEvent) -> None:
        """Returns: the copies are complete."""

    @property
    def is_recording(self) -> bool:
        """False: a CPU records no graph."""
        return False


class _DoneCopy:
    def synchronize(self) -> None:
        """Returns: the copies are complete."""


class CudaCopyStream:
    """A CUDA stream beside that of the model, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def pinned_buffer(self, size: int) -> torch.Tensor:
        """Pinned memory of `size` bytes."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, first: Sequence[Copy], rest: Sequence[Copy]) -> CopyEvent:
        """Queues `first` on the model's CUDA stream, `rest` on the other."""
        for source, target in first:
            target.copy_(source, non_blocking=True)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for source, target in rest:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # a waiting thread sleeps and does not spin
            event.record()
        return event

    def make_device_wait_for(self, event: CopyEvent) -> None:
        """Makes the model's CUDA stream wait."""
        torch.cuda.current_stream().wait_event(event)

    @property
    def is_recording(self) -> bool:
        """True while a CUDA graph is captured on the current CUDA stream."""
        return torch.cuda.is_current_stream_capturing()


def copy_stream_for(device: torch.device) -> CopyStream:
    """The copies from this device."""
    return CudaCopyStream(device) if device.type == "cuda" else CpuCopies()
