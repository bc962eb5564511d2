"""Layers in the fields of errors: `steering.layers[0]` is the first entry on the wire, and layer 0 in Python."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from steer_service.core.errors import SteerError

_LAYER = re.compile(r"steering\.layers\[(\d+)\]")


@contextmanager
def entries_named() -> Iterator[list[int]]:
    """Makes the layer in the field of a SteerError from the block the index of its entry.

    Yields a list, which the block fills with the layers of the entries, in order.
    """
    layers: list[int] = []
    try:
        yield layers
    except SteerError as error:
        found = _LAYER.match(error.field)
        if found is not None and int(found[1]) in layers:
            index = layers.index(int(found[1]))
            if error.reason == "DUPLICATE_LAYER":  # the entry that is too many
                index = layers.index(int(found[1]), index + 1)
            error.field = f"steering.layers[{index}]{error.field[found.end() :]}"
        raise


def name_layer(error: SteerError, layers: Sequence[int]) -> None:
    """Makes the index of an entry in the field of `error` its layer; `layers` are those of the entries, in order."""
    found = _LAYER.match(error.field)
    if found is not None and int(found[1]) < len(layers):
        error.field = f"steering.layers[{layers[int(found[1])]}]{error.field[found.end() :]}"
