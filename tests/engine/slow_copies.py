"""A stream of copies whose device is slow: what was sent is copied when somebody waits for it."""

from collections.abc import Sequence

import torch

from steer_service.ops.copy_stream import Copy, CopyEvent


class SlowCopies:
    """The slowest copies there may be: it makes copies when the host or the device waits for them, in order."""

    is_recording = False

    def __init__(self) -> None:
        self.waits = 0
        """How often the host waited."""
        self._copies: list[Copy] = []

    def pinned_buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def send(self, first: Sequence[Copy], rest: Sequence[Copy]) -> CopyEvent:
        for source, target in first:
            target.copy_(source)
        self._copies += rest
        return LateCopyEvent(self, len(self._copies))

    def make_device_wait_for(self, event: CopyEvent) -> None:
        assert isinstance(event, LateCopyEvent)
        self._make(event.count)

    def wait(self, count: int) -> None:
        self.waits += 1
        self._make(count)

    def _make(self, count: int) -> None:
        for index, (source, target) in enumerate(self._copies[:count]):
            target.copy_(source)
            self._copies[index] = (target, target)  # is not made again


class LateCopyEvent:
    """The first `count` copies of a stream."""

    def __init__(self, copies: SlowCopies, count: int) -> None:
        self.count = count
        self._stream = copies

    def synchronize(self) -> None:
        self._stream.wait(self.count)
