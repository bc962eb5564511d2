"""How many response streams of one kind a client has open."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from steer_service.core.errors import Overloaded


class ClientStreams:
    """Counts the open streams of each client; `what` they give is the word for the refusal."""

    def __init__(self, what: str, most: Callable[[str], int], retry_after_s: float) -> None:
        """`most`: how many the client of a share may have open."""
        self._what = what
        self._most = most
        self._retry_after_s = retry_after_s
        self._open: Counter[str] = Counter()

    @contextmanager
    def one_more(self, share: str) -> Iterator[None]:
        """Counts a stream for the duration of the block; raises Overloaded (CLIENT_QUOTA) if there are too many."""
        most = self._most(share)
        if self._open[share] >= most:
            raise Overloaded(
                f"the client receives {most} {self._what} at once, which is the most allowed",
                reason="CLIENT_QUOTA",
                retry_after_s=self._retry_after_s,
            )
        self._open[share] += 1
        try:
            yield
        finally:
            self._open[share] -= 1
            if not self._open[share]:
                del self._open[share]
