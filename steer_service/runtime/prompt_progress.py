"""The progress of a call with many prompts: a bar, or a function of the caller."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

PromptProgress = bool | Callable[[int, int], None]
"""True for a bar on standard error, or a function that is called with (prompts that ended, all prompts)."""


class Shown:
    """Shows how many of `total` prompts have ended, for the duration of a block."""

    def __init__(self, progress: PromptProgress, total: int) -> None:
        self._call = progress if callable(progress) else None
        self._total = total
        self._done = 0
        self._bar: Any = None
        if progress is True:
            from tqdm import tqdm  # most calls show none

            self._bar = tqdm(total=total, unit=" prompt")

    def count(self) -> None:
        """One more has ended."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        if self._call is not None:
            self._call(self._done, self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
