"""What was read from files, read again when they change."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from steer_service.core.errors import InvalidRequest
from steer_service.core.log_lines import log_event, places_of

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

State = tuple[int, int, int]
"""Of a file: time of its last change, size and number."""


class Reloaded(Generic[Value]):
    """The newest valid content of some files. Belongs to one event loop."""

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], Value]) -> None:
        """`what`: the files, in the plural, for the log. `read` raises InvalidRequest for files that are not valid."""
        self._what = what
        self._paths = paths
        self._read = read
        self._seen = self._states()
        self.value = read()
        """The content."""

    def refresh(self) -> bool:
        """Reads the files again if they have changed; True if the content is new.

        Files that are not valid are logged, and the content stays as it is.
        """
        states = self._states()
        if states == self._seen:
            return False
        try:
            value = self._read()
        except InvalidRequest as error:
            self._seen = states
            message = f"the {self._what} were changed and are not valid, the old ones stay in use: {error}"
            log_event(logger, logging.ERROR, "not_reloaded", message, {"reason": error.reason})
            return False
        except Exception as error:  # a slip here must not end the task that reads all files again
            self._seen = states
            message = f"the {self._what} were changed and cannot be read, the old ones stay in use: {places_of(error)}"
            log_event(logger, logging.ERROR, "not_reloaded", message, {"reason": type(error).__name__})
            return False
        if self._states() != states:  # one was replaced meanwhile, and may not fit the others: next time
            return False
        self._seen, self.value = states, value
        log_event(logger, logging.WARNING, "reloaded", f"the {self._what} were read again")
        return True

    def _states(self) -> list[State | None]:
        return [_state_of(path) for path in self._paths]


def _state_of(path: str) -> State | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
