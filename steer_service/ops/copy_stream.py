"""Copies to the host beside a device's own work, without waiting for either; on a CPU every copy is made at once."""

from collections.abc import Sequence
from typing import Protocol

import torch

Copy = tuple[torch.Tensor, torch.Tensor]
"""From where on the device, and to where in the host's memory."""


class CopyEvent(Protocol):
    """Copies on their way."""

    def synchronize(self) -> None:
        """Returns when they have been made; any thread may ask, and again."""


class CopyStream(Protocol):
    """The way from one device to the host."""

    def pinned_buffer(self, size: int) -> torch.Tensor:
        """So many bytes of the host to which copies can be made beside other work."""

    def send(self, first: Sequence[Copy], rest: Sequence[Copy]) -> CopyEvent:
        """Copies what the work handed to the device so far leaves behind.

        Work that is handed to it afterwards waits for the copies of `first`, but not for those of `rest`: whoever
        lets it write over their sources has it `make_device_wait_for` before.
        """

    def make_device_wait_for(self, event: CopyEvent) -> None:
        """Work that is handed to the device from now on waits for these copies; the caller does not."""

    @property
    def is_recording(self) -> bool:
        """True while the device's work is recorded in a graph and not done."""


class CpuCopies:
    """No way at all: what is done has been done."""

    def pinned_buffer(self, size: int) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(size, dtype=torch.uint8)

    def send(self, first: Sequence[Copy], rest: Sequence[Copy]) -> CopyEvent:
        """Copies at once."""
        for source, target in (*first, *rest):
            target.copy_(source)
        return _DoneCopy()

    def make_device_wait_for(self, event: CopyEvent) -> None:
        """They have been made."""

    @property
    def is_recording(self) -> bool:
        """Never."""
        return False


class _DoneCopy:
    def synchronize(self) -> None:
        """Nothing is on its way."""


class CudaCopyStream:
    """A stream of its own beside the one on which the model runs, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def pinned_buffer(self, size: int) -> torch.Tensor:
        """Pinned memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, first: Sequence[Copy], rest: Sequence[Copy]) -> CopyEvent:
        """Hands over the copies: `first` to the stream of the model, `rest` to the one beside it."""
        for source, target in first:
            target.copy_(source, non_blocking=True)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for source, target in rest:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # whoever waits sleeps
            event.record()
        return event

    def make_device_wait_for(self, event: CopyEvent) -> None:
        """Has the stream of the model wait."""
        torch.cuda.current_stream().wait_event(event)

    @property
    def is_recording(self) -> bool:
        """Whether a CUDA graph is captured on the current stream."""
        return torch.cuda.is_current_stream_capturing()


def copy_stream_for(device: torch.device) -> CopyStream:
    """The way from this device."""
    return CudaCopyStream(device) if device.type == "cuda" else CpuCopies()
