"""Objects that belong to one process: they cannot be pickled or copied, and say what to do instead."""

from typing import ClassVar, NoReturn


class ProcessBound:
    """The base of clients and handles."""

    _instead: ClassVar[str] = "make a client in each process"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled or copied: {self._instead}")


class BoundCapture(ProcessBound):
    """The base of what refers to a capture."""

    _instead = "fetch the captures, and send their arrays"
