"""What a user says of a file that its content does not say."""

import enum
from dataclasses import dataclass, fields
from typing import Any

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_layer, is_integer
from steer_service.core.number_limits import MAX_LAYERS


class RowOrder(enum.Enum):
    """What row 0 of an array of rows by layer is."""

    AFTER_LAYER = "after-layer"
    """Row L is the residual stream after decoder layer L: as many rows as layers."""
    EMBEDDINGS_FIRST = "embeddings-first"
    """Row 0 is the embeddings and row R the stream after layer R - 1, as in `hidden_states`: one row more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """The options of `read_vectors`; None is not given."""

    layer: int | None = None
    """The layer of a file with one vector, or the only one to read: after layer `layer`, counted from 0."""
    rows: RowOrder | None = None
    """The order of rows; also by value, "after-layer"."""
    position: int | None = None
    """Index of the position, in an array of shape [positions, layers, hidden_size]; -1 is the last one."""
    feature: int | None = None
    """The feature of a sparse autoencoder."""
    experiment: str | None = None
    """The id of an experiment in a capping configuration."""
    layer_count: int | None = None
    """Number of decoder layers of the model, if it is known."""
    hidden_size: int | None = None
    """Hidden size of the model, if it is known."""

    def __post_init__(self) -> None:
        if self.layer is not None:
            with within("layer"):
                check_layer(self.layer)
        self._check_integer("feature", 0, 1 << 31)
        self._check_integer("position", -(1 << 31), 1 << 31)
        self._check_integer("layer_count", 1, MAX_LAYERS + 1)
        self._check_integer("hidden_size", 1, 1 << 31)
        if self.rows is not None:
            try:
                object.__setattr__(self, "rows", RowOrder(self.rows))
            except ValueError:
                known = " or ".join(repr(order.value) for order in RowOrder)
                raise InvalidRequest(f"{self.rows!r:.40} is not {known}", reason="OUT_OF_RANGE", field="rows") from None
        if self.experiment is not None and not isinstance(self.experiment, str):
            raise InvalidRequest(f"{self.experiment!r:.40} is not text", reason="OUT_OF_RANGE", field="experiment")

    def _check_integer(self, name: str, first: int, end: int) -> None:
        value: Any = getattr(self, name)
        if value is not None and not (is_integer(value) and first <= value < end):
            raise InvalidRequest(f"{value!r:.40} is not one of {first}..{end - 1}", reason="OUT_OF_RANGE", field=name)

    def check_used(self, *used: str) -> None:
        """Raises InvalidRequest for an option that was given and says nothing of this file."""
        for name in (field.name for field in fields(self)):
            if name not in (*used, "layer_count", "hidden_size") and getattr(self, name) is not None:
                takes = f"it takes {' and '.join(map(option, used))}" if used else "it takes none"
                raise InvalidRequest(
                    f"{option(name)} is not for this layout; {takes}", reason="UNKNOWN_OPTION", field=name
                )


OPTIONS = tuple(field.name for field in fields(ReadOptions))
"""Names of the options."""


def option(name: str) -> str:
    """An option as messages name it: on the command line and in Python."""
    dashed = name.replace("_", "-")
    return f"--{dashed} ({name}= in Python)"
