"""The time that a request has for generation: when it is over, its outputs end with the tokens that they have."""

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBudget:
    """The end of the time that a request has; may be used from any thread."""

    ends_at: float
    """On the monotonic clock, in seconds; infinite for a request without a budget."""

    @classmethod
    def of(cls, seconds: float | None) -> Self:
        """A budget of so many seconds from now; None: no limit."""
        return cls(ends_at=math.inf if seconds is None else time.monotonic() + seconds)

    @property
    def is_limited(self) -> bool:
        """False for a request without a budget."""
        return self.ends_at < math.inf

    @property
    def left_s(self) -> float:
        """Seconds until its end, at least 0; infinite for a request without a budget."""
        return max(0.0, self.ends_at - time.monotonic())

    @property
    def is_over(self) -> bool:
        """True once the time has passed."""
        return self.is_limited and time.monotonic() >= self.ends_at

    def timeout(self) -> asyncio.Timeout:
        """A block that raises TimeoutError when the time is over; nothing may be yielded within it."""
        return asyncio.timeout(self.left_s if self.is_limited else None)
