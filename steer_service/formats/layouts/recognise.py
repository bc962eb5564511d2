"""Tries the layouts one after the other: the most particular first."""

from collections.abc import Callable

from steer_service.formats.layer_vectors import Imported
from steer_service.formats.layouts.assistant_axis import axis_layout, capping_layout
from steer_service.formats.layouts.dict_layouts import (
    by_layer_layout,
    entry_layout,
    layer_activations_layout,
    layer_indices_layout,
    list_layout,
)
from steer_service.formats.layouts.lm_eval import lm_eval_layout
from steer_service.formats.layouts.open_file import OpenFile
from steer_service.formats.layouts.sae_decoder import sae_layout

Layout = Callable[[OpenFile], Imported | None]
"""The vectors of a file of one layout; None for a file of another."""

LAYOUTS: tuple[Layout, ...] = (
    layer_activations_layout,
    layer_indices_layout,
    capping_layout,
    lm_eval_layout,
    axis_layout,
    sae_layout,
    entry_layout,
    by_layer_layout,
    list_layout,
)


def recognise(file: OpenFile) -> Imported:
    """The vectors of a file; raises InvalidRequest for one that no layout reads."""
    for layout in LAYOUTS:
        found = layout(file)
        if found is not None:
            return found
    raise file.unknown()
