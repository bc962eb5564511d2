"""A file of prompts that may come slowly, from a pipe or a terminal."""

import io
import os
import select


class EndableFile(io.RawIOBase):
    """A file, pipe or terminal whose reader can be told that it ends here."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` stays open."""
        super().__init__()
        self._descriptor = descriptor
        self._woken, self._wake = os.pipe()

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """The next bytes that are there; waits for one, or for `end`."""
        ready, _, _ = select.select([self._descriptor, self._woken], [], [])
        if self._woken in ready:
            return 0
        return os.readv(self._descriptor, [buffer])

    def end(self) -> None:
        """Whoever reads now or later meets the end of the file; from any thread."""
        os.write(self._wake, b"\0")

    def close(self) -> None:
        """Frees what the object has of its own."""
        if not self.closed:
            os.close(self._woken)
            os.close(self._wake)
        super().close()
