"""The bytes of a request, held only until they are read."""


class RequestBody:
    """What gRPC hands to a method in place of a message.

    An error keeps the frames that it passed through until the garbage collector comes, and with them everything in
    their variables. A frame that held 16 MiB would keep them; this object lets go of them.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def data(self) -> bytes:
        """The bytes; b"" once they were taken."""
        return self._data

    def take(self) -> bytes:
        """The bytes, which this object holds no longer."""
        data, self._data = self._data, b""
        return data
