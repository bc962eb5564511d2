"""The layer that a key or the name of a file means: the stream after decoder layer L, counted from 0."""

import re
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import is_integer
from steer_service.core.number_limits import MAX_LAYERS

_NUMBER = r"(?P<layer>0|[1-9]\d{0,4})"
_DIRECTION = r"direction\.(?P<n>0|[1-9]\d{0,4})"
_KEY = re.compile(
    rf"(?:\w+\.)*(?:layers?|blocks?|h|l)[._ ]?{_NUMBER}(?:\.output(?:\.0)?)?|{_DIRECTION}",
    re.ASCII | re.IGNORECASE,
)
_HOOK = re.compile(rf"(?:\w+\.)*(?:layers?|blocks?|h)\.{_NUMBER}\.(?P<point>[\w.]+)", re.ASCII)
_PLACES = {"hook_resid_post": 0, "hook_resid_pre": -1, "hook_out": 0, "hook_in": -1}
"""Hook point of TransformerLens on the residual stream -> the layer after which it is, from that of its block.

TransformerLens 4 calls the places of its older names `hook_out` and `hook_in`; `attn.hook_out` is another place."""

_IN_FILE_NAME = re.compile(
    rf"(?P<count>(?<![a-z0-9])(?:n|num|total|all|first|last|top)[-_. ]?)?"
    rf"(?<![a-z0-9])(?P<word>(?:vec)?(?:layers?|blocks?|l))(?P<sign>[-_. ]*){_NUMBER}(?!\d)"
    r"(?P<more>[-:.]\d+|[a-z]|[-_:., ]+(?:(?:to|and|through)[-_ ]*)?\d{1,4}(?![a-z0-9]))?",
    re.ASCII | re.IGNORECASE,
)
_NORM = re.compile(r"l[12]", re.IGNORECASE)
"""A norm or a regularisation as often as a layer."""
_MODEL = re.compile(r"l\d[-_. ]*\d+b(?![a-z0-9])", re.ASCII | re.IGNORECASE)
"""A model: Llama 3, 8B."""


def layer_of_key(key: Any, layer_count: int | None = None) -> int | None:
    """The layer of a key such as 13, "13", "layer_13", "model.layers.13" or "blocks.13.hook_resid_post".

    -1 or "-1" is the last one of the model's `layer_count` layers. None for a key that names no layer. Raises
    InvalidRequest for a layer that cannot be, for the embeddings, and for a hook point that is not on the residual
    stream.
    """
    if isinstance(key, str) and re.fullmatch(r"-?\d{1,8}", key, re.ASCII):
        return _numbered(int(key), key, layer_count)
    if is_integer(key):
        return _numbered(int(key), key, layer_count)
    if not isinstance(key, str):
        return None
    if key.isascii() and key.isdecimal():
        return _checked(MAX_LAYERS, key)
    found = _KEY.fullmatch(key)
    if found is not None:
        return _checked(int(found["layer"] or found["n"]), key)
    hook = _HOOK.fullmatch(key)
    if hook is None:
        return None
    if hook["point"] not in _PLACES:
        raise InvalidRequest(
            f"{key!r:.60} is another place than the residual stream after a layer, which alone is steered here; "
            "expected hook_resid_post, hook_resid_pre, hook_out or hook_in of a whole block",
            reason="UNKNOWN_LAYOUT",
            field="path",
        )
    layer = int(hook["layer"]) + _PLACES[hook["point"]]
    if layer < 0:
        raise embeddings(f"{key!r:.60}")
    return _checked(layer, key)


def _numbered(number: int, key: Any, layer_count: int | None) -> int:
    """The layer of a number. `hidden_states[-K]` and `layers[-K]` of transformers are the same place, so -K is one."""
    if not -MAX_LAYERS <= number < 0:
        return _checked(number, key)
    if layer_count is None:
        raise InvalidRequest(
            f"layer {key!r:.40} counts from the last layer; --layer-count (layer_count= in Python), the number of "
            "decoder layers of the model, says which it is",
            reason="NEEDS_OPTION",
            field="layer_count",
        )
    if number < -layer_count:
        raise embeddings(f"layer {key!r:.40} of a model with {layer_count} layers")
    return layer_count + number


def layer_of_file_name(name: str) -> int | None:
    """The layer in the name of a file, such as `vec_layer_13_x.pt`; None if it names none.

    Raises InvalidRequest for a name with two different layers, and for one that may mean something else: a range, a
    number of layers, one counted from the end, a norm, a model.
    """
    stem = re.sub(r"\.(?:pt|pth|bin|npy|npz|safetensors|json|gguf)$", "", name, flags=re.IGNORECASE)
    hook = re.search(r"(?:^|[^a-z0-9])(blocks\.\d+\.hook_\w+)", stem)
    if hook is not None:
        return layer_of_key(hook[1])
    found = list(_IN_FILE_NAME.finditer(stem))
    layers = {int(one["layer"]) for one in found}
    if len(layers) > 1 or any(_is_doubtful(one) for one in found):
        raise InvalidRequest(
            f"the name {name!r:.80} may mean more than one layer, or none; --layer (layer= in Python) says which",
            reason="NEEDS_OPTION",
            field="layer",
        )
    return _checked(layers.pop(), name) if layers else None


def _is_doubtful(found: re.Match[str]) -> bool:
    is_other = found["word"].lower() == "l" and (
        _NORM.fullmatch(found[0]) or _MODEL.match(found.string, found.start("word"))
    )
    return bool("-" in found["sign"] or found["more"] or found["count"] or is_other)


def embeddings(what: str) -> InvalidRequest:
    """The error for a vector of the embeddings."""
    return InvalidRequest(
        f"{what} is the input of the first decoder layer: the embeddings, which are not steered here",
        reason="UNKNOWN_LAYER",
        field="layers",
    )


def _checked(layer: int, key: Any) -> int:
    if not 0 <= layer < MAX_LAYERS:
        raise InvalidRequest(
            f"{key!r:.40} is not a layer: expected a whole number in 0..{MAX_LAYERS - 1}",
            reason="UNKNOWN_LAYOUT",
            field="layers",
        )
    return layer
