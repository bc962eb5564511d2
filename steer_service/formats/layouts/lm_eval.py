"""The hook points of steered models in lm-eval: `{"layers.13": {"action": "add", "steering_vector": v, ...}}`.

lm_eval/models/hf_steered.py (0.4.13), `SteeredModel`: a hook point is a module of the base model, and its output is
changed at every position. "add" adds `steering_coefficient * steering_vector`. "clamp" sets the projection of
`row - bias` onto the unit vector to `steering_coefficient`: here a cap whose bounds are both `steering_coefficient +
bias . v`. A `head_index` and hook points other than whole layers are refused: they are other places. A .csv of lm-eval
names features of sparse autoencoders of a hub. It is refused with the lines that make a file of vectors from it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from steer_service.core.arrays import norm_of
from steer_service.core.errors import within
from steer_service.core.specs import AddSpec, ProjectionCapSpec, SteeringOp
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.layouts.assistant_axis import number
from steer_service.formats.layouts.layer_names import layer_of_key
from steer_service.formats.layouts.open_file import OpenFile, bad
from steer_service.formats.layouts.stored_array import StoredArray

KNOWN = {"action", "steering_vector", "steering_coefficient", "bias", "head_index"}


def table_of_lm_eval(name: str) -> str:
    """What the refusal of such a .csv says: what it is, and two ways to a file that is read."""
    return (
        f"{name} is a table of lm-eval: it names features of sparse autoencoders, which lm-eval loads from a hub. "
        "These lines of Python make a file with the vectors themselves:\n"
        "    from lm_eval.models.hf_steered import SteeredModel\n"
        f'    hooks = SteeredModel.derive_steer_config("{name}")\n'
        "    for hook in hooks.values():\n"
        '        if hook["action"] == "add":\n'
        '            hook["bias"] = None  # lm-eval refuses it with this action\n'
        '    torch.save(hooks, "steer.pt")\n'
        "Or read the autoencoder's own file or folder with --feature (feature= in Python) and --layer (layer=)"
    )


def lm_eval_layout(file: OpenFile) -> Imported | None:
    """The operations of a file of lm-eval; None for another file."""
    content = file.content
    if not isinstance(content, Mapping) or not content or not all(map(_is_hook, content.values())):
        return None
    file.options.check_used()
    operations: dict[int, tuple[SteeringOp, ...]] = {}
    for key, hook in content.items():
        layer = layer_of_key(key)
        if layer is None:
            raise bad(f"the hook point {key!r:.60} is not a decoder layer; expected layers.N")
        with within(f"layers[{layer}]"):
            operations[layer] = (*operations.get(layer, ()), _operation(hook))
    return file.operations(operations, "lm-eval")


def _is_hook(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "steering_vector" in entry and "action" in entry


def _operation(hook: Mapping[Any, Any]) -> SteeringOp:
    vector, bias, action = hook["steering_vector"], hook.get("bias"), hook["action"]
    if hook.keys() - KNOWN:
        raise bad(f"{next(iter(hook.keys() - KNOWN))!r:.40} is not known; expected {', '.join(sorted(KNOWN))}")
    if not isinstance(vector, StoredArray) or not isinstance(bias, StoredArray | None):
        raise bad("steering_vector or bias is not an array")
    if hook.get("head_index") is not None:
        raise bad("head_index: attention heads are another place than the residual stream, which alone is steered here")
    values, coefficient = vector.only_vector(), number(hook.get("steering_coefficient", 1.0), "steering_coefficient")
    if action == "add":
        if bias is not None:
            raise bad("lm-eval takes no bias with the action add; set it to None")
        return AddSpec.from_unnormalized(values, coefficient) if values.any() else AddSpec(values, coefficient)
    if action != "clamp":
        raise bad(f"the action {action!r:.40} is neither add nor clamp")
    bound = coefficient
    if bias is not None:
        offset = bias.only_vector()
        if offset.size != values.size or not values.any():
            raise bad(f"bias has {offset.size} numbers and the vector {values.size}, or the vector is zero")
        bound += float(np.dot(offset.astype(np.float64), values.astype(np.float64)) / norm_of(values))
    return ProjectionCapSpec.from_unnormalized(values, bound, bound)
