"""The dictionaries of assistant-axis, and its capping configurations.

* **assistant-axis**: `{"axis": rows, "default_mean": rows, "role_mean": ...}` (pipeline/5_axis.py) and
  `{"vector": rows, "type": ..., "role": ...}` (pipeline/4_vectors.py), rows of shape [layers, hidden_size]. Row L is
  added to the output of decoder layer L (assistant_axis/steering.py: `ActivationSteering(steering_vectors=[axis[22]],
  layer_indices=[22])`). The axis points from role-playing to the default assistant.
* **capping**: `{"vectors": {name: {"layer": ..., "vector": ...}}, "experiments": [{"id": ..., "interventions":
  [{"vector": name, "cap": ...}]}]}`. `build_capping_steerer` limits the projection onto the unit vector to at most
  `cap`, after that layer, in the order of the list. It leaves an intervention without `cap` out, and so does this
  reader. That is ProjectionCapSpec(max=cap).
"""

from collections.abc import Mapping
from typing import Any

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import is_integer
from steer_service.core.specs import ProjectionCapSpec
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.layouts.array_layouts import array_layout
from steer_service.formats.layouts.open_file import OpenFile, bad, needs
from steer_service.formats.layouts.read_options import RowOrder
from steer_service.formats.layouts.stored_array import StoredArray

AXIS = {"axis", "default_mean", "role_mean", "n_default", "n_roles"}
"""Entries of an axis; `axis` and one of the means are required."""
ROLE = {"vector", "type", "role"}
"""Entries of the vector of a role."""
NAMED = 8
"""Experiments that an error names."""


def axis_layout(file: OpenFile) -> Imported | None:
    """An axis or the vector of a role; None for another file."""
    content = file.content
    if not isinstance(content, Mapping) or (content.keys() - AXIS and content.keys() != ROLE):
        return None
    if not content.keys() >= {"axis", "default_mean"} and content.keys() != ROLE:
        return None
    array = content["axis"] if "axis" in content else content["vector"]
    if not isinstance(array, StoredArray) or len(array.shape) != 2:
        raise bad("expected rows of shape [layers, hidden_size]")
    alone = OpenFile(path=file.path, container=file.container, content=array, options=file.options)
    found = array_layout(alone, array, order=RowOrder.AFTER_LAYER)
    return found if found.kind == "vector" else _renamed(found)


def _renamed(found: Imported) -> Imported:
    return Imported(layers=found.layers, kind="assistant-axis", found=found.found)


def capping_layout(file: OpenFile) -> Imported | None:
    """One experiment of a capping configuration; None for another file."""
    content = file.content
    if not isinstance(content, Mapping) or not content.keys() >= {"vectors", "experiments"}:
        return None
    file.options.check_used("experiment")
    vectors = content["vectors"]
    if not isinstance(vectors, Mapping):
        raise bad("vectors is not a dict; expected {name: {layer, vector}}")
    experiment = _experiment(file, content["experiments"])
    interventions = experiment.get("interventions")
    if not isinstance(interventions, list):
        raise bad("interventions is not a list; expected [{vector, cap}]")
    caps: dict[int, tuple[ProjectionCapSpec, ...]] = {}
    left_out = 0
    for index, intervention in enumerate(interventions):
        with within(f"interventions[{index}]"):
            if not isinstance(intervention, Mapping):
                raise bad("it is not a dict; expected {vector, cap}")
            if "cap" not in intervention:
                left_out += 1
                continue
            layer, cap = _cap(vectors, intervention)
            caps[layer] = (*caps.get(layer, ()), cap)
    if not caps:
        raise bad("the experiment has no intervention with a cap")
    found = f"experiment {experiment.get('id')!r:.60}"
    return file.operations(
        caps, "capping", f"{found}, {left_out} interventions without a cap left out" if left_out else found
    )


def _experiment(file: OpenFile, experiments: Any) -> Mapping[str, Any]:
    if not isinstance(experiments, list) or not all(isinstance(one, Mapping) for one in experiments):
        raise bad("experiments is not a list; expected [{id, interventions}]")
    wanted = file.options.experiment
    if wanted is None and len(experiments) == 1:
        only: Mapping[str, Any] = experiments[0]
        return only
    names = [one.get("id") for one in experiments]
    known = ", ".join(f"{name!s:.60}" for name in names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    if wanted is None:
        raise needs("experiment", f"it has {len(names)} experiments: {known}")
    matching = [one for one in experiments if isinstance(one.get("id"), str | int) and str(one["id"]) == wanted]
    if len(matching) != 1:
        raise InvalidRequest(
            f"{len(matching)} experiments are called {wanted!r:.60}; there are {known}",
            reason="OUT_OF_RANGE",
            field="experiment",
        )
    return matching[0]


def _cap(vectors: Mapping[Any, Any], intervention: Mapping[str, Any]) -> tuple[int, ProjectionCapSpec]:
    name, cap = intervention.get("vector"), intervention["cap"]
    entry = vectors.get(name) if isinstance(name, str | int) else None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("vector"), StoredArray):
        raise bad(f"there is no vector {name!r:.60}")
    layer: Any = entry.get("layer")
    if not is_integer(layer) or layer < 0:
        raise bad(f"the layer {layer!r:.40} of {name!r:.60} is not a whole number from 0")
    return int(layer), ProjectionCapSpec(vector=entry["vector"].only_vector(), max=number(cap, "cap"))


def number(value: Any, name: str) -> float:
    """`value` as a finite number; raises InvalidRequest for anything else."""
    if isinstance(value, StoredArray) and not value.shape:
        value = float(value.read(()))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(f"{name} {value!r:.40} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise bad(f"{name} is not a finite number") from None
