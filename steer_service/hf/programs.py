"""Steers and captures the rows of one output while a batch runs.

T: rows of one forward pass; R: rows that are steered; S: scopes; D: hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.layer_change import ACTED, CAPPED, IDLE
from steer_service.core.spans import Spans, between, positions_of
from steer_service.core.specs import ProjectionCapSpec, SteeringSpec
from steer_service.hf.layers import widened
from steer_service.ops.reference import is_outside_bounds, prepared

Operations = Sequence[tuple[Callable[[torch.Tensor], torch.Tensor], int]]


class TorchProgram:
    """A steering spec as torch operations on one device."""

    def __init__(self, steering: SteeringSpec, device: torch.device) -> None:
        numbers = steering.numbered_scopes().numbers
        self.layers: dict[int, Operations] = {
            layer: [
                (prepared(operation, device), scope)
                for operation, scope in zip(spec.operations, numbers[layer], strict=True)
            ]
            for layer, spec in steering.active_layers().items()
        }
        """Layer -> its operations, in the order in which they run, each with the number of its scope."""
        self.reports_change = steering.report_change
        """True if `changes` is to be called for the receipt."""
        self._specs = steering.active_layers()

    def apply(
        self, layer: int, rows_RD: torch.Tensor, is_inside_SR: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The rows after the operations of a layer, computed in float32 and rounded once to their own dtype.

        `is_inside_SR` says for each scope which rows it includes; None: all. Raises InvalidRequest if a result is not
        finite.
        """
        steered_RD = widened(rows_RD)
        for operation, scope in self.layers[layer]:
            is_inside_R = None if is_inside_SR is None else is_inside_SR[scope]
            steered_RD = _changed(steered_RD, operation, is_inside_R)
        steered_RD = steered_RD.to(rows_RD.dtype)
        if not torch.isfinite(steered_RD).all():
            raise InvalidRequest(
                f"steering made the residual stream infinite or NaN after layer {layer}; lower the scale, or use "
                "smaller vectors",
                reason="STEERING_NONFINITE",
                field="steering",
            )
        return steered_RD

    def changes(
        self, layer: int, rows_RD: torch.Tensor, is_inside_SR: Sequence[torch.Tensor] | None = None
    ) -> npt.NDArray[np.float32]:
        """What a receipt reports of these rows, shape [R, CHANGE_COLUMNS], see `core.layer_change`.

        The operations run a second time, so that `apply` costs nothing more where nothing is reported.
        """
        before_RD = last_RD = widened(rows_RD)
        states_R = torch.full((len(rows_RD),), IDLE, device=rows_RD.device)
        everywhere_R = torch.ones(len(rows_RD), dtype=torch.bool, device=rows_RD.device)
        specs = self._specs[layer].operations
        for (operation, scope), spec in zip(self.layers[layer], specs, strict=True):
            acts_R = everywhere_R if is_inside_SR is None else is_inside_SR[scope]
            states_R[acts_R & (states_R == IDLE)] = ACTED
            if isinstance(spec, ProjectionCapSpec):
                states_R[acts_R & is_outside_bounds(last_RD, spec)] = CAPPED
            last_RD = _changed(last_RD, operation, acts_R)
        before_R, moved_R = (rows.double().norm(dim=1) for rows in (before_RD, last_RD - before_RD))
        relative_R = torch.where(before_R > 0, moved_R / before_R, torch.nan)
        return torch.stack([relative_R.float(), states_R], dim=1).cpu().numpy()


def _changed(
    rows_RD: torch.Tensor, operation: Callable[[torch.Tensor], torch.Tensor], is_inside_R: torch.Tensor | None
) -> torch.Tensor:
    """The rows after an operation on those that are inside; None: all."""
    changed_RD = operation(rows_RD)
    return changed_RD if is_inside_R is None else torch.where(is_inside_R[:, None], changed_RD, rows_RD)


@dataclass(slots=True)
class RowWork:
    """Steers and captures the rows of one output."""

    program: TorchProgram | None
    """The operations; None steers nothing."""
    steered: Spans
    """Positions that are steered."""
    scopes: tuple[Spans, ...]
    """Positions of each scope of the program; empty if it has one, which is `steered`."""
    capture: CaptureSpec | None
    """Layers and sites that are captured; None captures nothing."""
    captured: Spans
    """Positions that are captured."""
    dtype: torch.dtype
    """The dtype of captured rows."""
    hidden_size: int
    """Elements of a row."""
    rows: dict[tuple[int, CaptureSite], list[torch.Tensor]] = field(default_factory=dict)
    """(layer, site) -> captured rows on the CPU, in the order of positions."""
    steered_at: dict[int, int] = field(default_factory=dict)
    """Layer -> the number of rows that were steered there."""
    changes: dict[int, list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    """Layer -> what was recorded of its rows, in parts, if the spec reports changes."""
    done: int = 0
    """The number of rows that went through the model: the position of the next row."""

    def change(self, layer: int, rows_TD: torch.Tensor) -> torch.Tensor | None:
        """Captures and steers the rows of a forward pass after a layer; their first position is `done`.

        Returns the steered rows, or None if no row is steered there. Raises InvalidRequest where
        `TorchProgram.apply` does.
        """
        end = self.done + len(rows_TD)
        self._read(CaptureSite.BEFORE, layer, rows_TD, end)
        changed_TD = None
        if self.program is not None and layer in self.program.layers:
            chosen = self._chosen(self.steered, end)
            if len(chosen):
                changed_TD = rows_TD.clone()
                inside = [torch.isin(chosen, self._chosen(spans, end)).to(rows_TD.device) for spans in self.scopes]
                changed_TD[chosen] = self.program.apply(layer, rows_TD[chosen], inside or None)
                if self.program.reports_change:
                    part = self.program.changes(layer, rows_TD[chosen], inside or None)
                    self.changes.setdefault(layer, []).append(part)
            self.steered_at[layer] = self.steered_at.get(layer, 0) + len(chosen)
        self._read(CaptureSite.AFTER, layer, rows_TD if changed_TD is None else changed_TD, end)
        return changed_TD

    def take(self, layer: int, site: CaptureSite) -> torch.Tensor:
        """The rows captured since the last call, shape [rows, hidden_size]."""
        parts = self.rows.pop((layer, site), [])  # none if the output ended before its first forward pass
        return torch.cat(parts) if parts else torch.empty((0, self.hidden_size), dtype=self.dtype)

    def is_idle_at(self, layer: int) -> bool:
        """True if no row is steered or captured after a layer."""
        is_read = self.capture is not None and layer in self.capture.layers
        return not is_read and (self.program is None or layer not in self.program.layers)

    def _read(self, site: CaptureSite, layer: int, rows_TD: torch.Tensor, end: int) -> None:
        if self.capture is None or layer not in self.capture.layers or site not in self.capture.site.parts:
            return
        chosen = self._chosen(self.captured, end)
        self.rows.setdefault((layer, site), []).append(rows_TD[chosen].to("cpu", self.dtype, copy=True))

    def _chosen(self, spans: Spans, end: int) -> torch.Tensor:
        """The positions of `spans` within `done`..`end` - 1, counted from `done`; int64."""
        return torch.from_numpy(positions_of(between(spans, self.done, end)).astype(np.int64)) - self.done
