"""Which rows of an output are steered and which are captured: decided once, when its request is prepared."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from typing import Self

import numpy as np
import numpy.typing as npt

from steer_service.core.errors import within
from steer_service.core.positions import PositionScope
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.request import GenerateRequest
from steer_service.core.span_table import ScopeTable, SpanTable
from steer_service.core.spans import (
    EVERYWHERE,
    NOWHERE,
    Spans,
    between,
    check_count,
    clipped,
    positions_of,
    united,
)
from steer_service.core.specs import SteeringSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedPart:
    """The captured rows among some consecutive rows of an output."""

    spans: Spans
    """Their positions."""
    first: int
    """How many captured rows come before them."""
    end: int
    """`first` plus the number of rows."""


@dataclass(frozen=True, kw_only=True)
class RowSelection:
    """The rows of one output: a row is a token fed to the model, so the last sampled token has none."""

    prompt_tokens: int
    """Rows of the prompt."""
    limit: int
    """Rows at most, see `rows_at_most`."""
    steered: Spans
    """Positions to steer, by any operation; empty for none."""
    scopes: tuple[Spans, ...]
    """Positions of each of the spec's scopes, see `SteeringSpec.numbered_scopes`; empty if there is only one."""
    captured: Spans
    """Positions to capture; empty for none."""

    @classmethod
    def of(cls, request: GenerateRequest, prompt_tokens: int, limit: int, places: PromptPlaces | None = None) -> Self:
        """The selection of a request whose prompt has `prompt_tokens` tokens.

        `places` are needed for positions by message, by role, and without special tokens. Raises InvalidRequest, with
        the field, for positions that the request cannot have; Unsupported for those that are not known.
        """
        steering, capture = request.steering, request.capture
        with within("steering"):
            scopes = _resolved_scopes(steering, prompt_tokens, limit, places) if steering is not None else ()
        with within("capture.positions"):
            captured = _resolved(capture.positions, prompt_tokens, limit, places) if capture is not None else NOWHERE
        does_steer = steering is not None and not steering.is_empty()
        does_capture = capture is not None and bool(capture.layers)
        return cls(
            prompt_tokens=prompt_tokens,
            limit=limit,
            steered=_union(scopes) if does_steer else NOWHERE,
            scopes=scopes if does_steer and len(scopes) > 1 else (),
            captured=captured if does_capture else NOWHERE,
        )

    @property
    def reusable(self) -> int:
        """Rows that may come from the prefix cache: all before the first captured one."""
        return self.captured[0][0] if self.captured else self.limit

    def rows_after(self, generated: int) -> int:
        """Rows fed to the model by the time that so many tokens have been generated."""
        return rows_fed(self.prompt_tokens, generated)

    @cached_property
    def steered_table(self) -> SpanTable:
        """`steered`, for the workers; made once for all outputs."""
        return SpanTable.of(self.steered)

    @cached_property
    def scope_table(self) -> ScopeTable | None:
        """`scopes`, for the workers; None if there is only one."""
        return ScopeTable.of(self.scopes) if self.scopes else None

    @cached_property
    def captured_table(self) -> SpanTable:
        """`captured`, for the workers, and to count rows in it."""
        return SpanTable.of(self.captured)

    @cached_property
    def steered_digest(self) -> str:
        """A text that is the same only for the same rows of each scope."""
        where = self.scope_table if self.scope_table is not None else self.steered_table
        return sha256(where.to_bytes()).hexdigest()

    def captured_part(self, first: int, end: int) -> CapturedPart:
        """The captured rows at positions first..end-1."""
        table = self.captured_table
        return CapturedPart(spans=between(self.captured, first, end), first=table.count(first), end=table.count(end))

    def steered_positions(self, end: int) -> npt.NDArray[np.int32]:
        """The positions to steer before `end`, ascending, shape [rows]."""
        return positions_of(clipped(self.steered, end))


def rows_at_most(prompt_tokens: int, max_tokens: int) -> int:
    """Rows of an output at most: prompt tokens + max_tokens - 1, and those of the prompt if nothing is generated."""
    return prompt_tokens + max(max_tokens, 1) - 1


def rows_fed(prompt_tokens: int, generated: int) -> int:
    """Rows of an output: the last sampled token is never fed, and an output without a token counts no row.

    Of such an output, which its time budget ended, nobody knows how much of the prompt was computed.
    """
    return prompt_tokens + generated - 1 if generated else 0


def _resolved_scopes(
    steering: SteeringSpec, prompt_tokens: int, limit: int, places: PromptPlaces | None
) -> tuple[Spans, ...]:
    with within("positions"):  # even if all operations have positions of their own
        shared = _resolved(steering.positions, prompt_tokens, limit, places)
    spans: list[Spans] = []
    count = 0
    for path, scope in steering.numbered_scopes().paths.items():
        with within(path):
            if scope is not steering.positions:
                spans.append(_resolved(scope, prompt_tokens, limit, places, count))
            else:
                check_count(len(shared), count)
                spans.append(shared)
            count += len(spans[-1])
    return tuple(spans)


def _union(scopes: tuple[Spans, ...]) -> Spans:
    return scopes[0] if len(scopes) == 1 else united(chain.from_iterable(scopes))


def _resolved(
    scope: PositionScope | None, prompt_tokens: int, limit: int, places: PromptPlaces | None, before: int = 0
) -> Spans:
    """The spans of a scope. `before`: those of the scopes before it."""
    return EVERYWHERE if scope is None else scope.resolve(prompt_tokens, limit, places, before)
