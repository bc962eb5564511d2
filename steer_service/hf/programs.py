"""What a request does to the stream, and what is read of it, while a batch of outputs runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import Spans, between, positions_of
from steer_service.core.specs import SteeringSpec
from steer_service.hf.layers import widened
from steer_service.ops.reference import prepared

Operations = Sequence[Callable[[torch.Tensor], torch.Tensor]]


class TorchProgram:
    """A spec, ready to run on a device."""

    def __init__(self, steering: SteeringSpec, device: torch.device) -> None:
        self.layers: dict[int, Operations] = {
            layer: [prepared(operation, device) for operation in spec.operations]
            for layer, spec in steering.active_layers().items()
        }
        """Layer -> what is done there, in order."""

    def apply(self, layer: int, rows_RD: torch.Tensor) -> torch.Tensor:
        """Rows of a layer after its operations: float32 inside, rounded once; raises InvalidRequest if not finite."""
        steered_RD = widened(rows_RD)
        for operation in self.layers[layer]:
            steered_RD = operation(steered_RD)
        steered_RD = steered_RD.to(rows_RD.dtype)
        if not torch.isfinite(steered_RD).all():
            raise InvalidRequest(
                f"the stream was not finite under steering at layer {layer}",
                reason="STEERING_NONFINITE",
                field="steering",
            )
        return steered_RD


@dataclass(slots=True)
class RowWork:
    """What happens to the rows of one output."""

    program: TorchProgram | None
    """What is done to them."""
    steered: Spans
    """At which positions."""
    capture: CaptureSpec | None
    """What is read of them."""
    captured: Spans
    """At which positions."""
    dtype: torch.dtype
    """Element type of what is read."""
    rows: dict[tuple[int, CaptureSite], list[torch.Tensor]] = field(default_factory=dict)
    """(layer, site) -> what was read, in the order of positions."""
    steered_at: dict[int, int] = field(default_factory=dict)
    """Layer -> rows that went through the program there."""
    done: int = 0
    """Rows that went through the model."""

    def change(self, layer: int, rows_TD: torch.Tensor) -> torch.Tensor | None:
        """Reads and steers rows `done` and after at a layer; None if nothing is to be changed."""
        end = self.done + len(rows_TD)
        self._read(CaptureSite.BEFORE, layer, rows_TD, end)
        changed_TD = None
        if self.program is not None and layer in self.program.layers:
            chosen = self._chosen(self.steered, end)
            if len(chosen):
                changed_TD = rows_TD.clone()
                changed_TD[chosen] = self.program.apply(layer, rows_TD[chosen])
            self.steered_at[layer] = self.steered_at.get(layer, 0) + len(chosen)
        self._read(CaptureSite.AFTER, layer, rows_TD if changed_TD is None else changed_TD, end)
        return changed_TD

    def take(self, layer: int, site: CaptureSite) -> torch.Tensor:
        """What was read and not taken yet, shape [rows, hidden_size]."""
        return torch.cat(self.rows.pop((layer, site)))

    def is_idle_at(self, layer: int) -> bool:
        """True if nothing is done at a layer."""
        is_read = self.capture is not None and layer in self.capture.layers
        return not is_read and (self.program is None or layer not in self.program.layers)

    def _read(self, site: CaptureSite, layer: int, rows_TD: torch.Tensor, end: int) -> None:
        if self.capture is None or layer not in self.capture.layers or site not in self.capture.site.parts:
            return
        chosen = self._chosen(self.captured, end)
        self.rows.setdefault((layer, site), []).append(rows_TD[chosen].to("cpu", self.dtype, copy=True))

    def _chosen(self, spans: Spans, end: int) -> torch.Tensor:
        """Which of the rows `done`..`end` - 1 the spans hold, counted from `done`."""
        return torch.from_numpy(positions_of(between(spans, self.done, end)).astype(np.int64)) - self.done
