"""One feature of a sparse autoencoder: its row of the decoder, as a vector.

* SAELens (6.54): a folder with `sae_weights.safetensors` and `cfg.json`. `W_dec` has shape [features, hidden_size]
  (saes/sae.py). The configuration has `hook_name`, in `metadata` since version 6, and for transcoders `hook_name_out`.
* Gemma Scope: `params.npz` with `W_dec`, or `params.safetensors` with `w_dec`, of the same shape.
* EleutherAI's sparsify: `sae.safetensors` with `W_dec`, and a `cfg.json` without the hook point.
* `decoder.weight` of a `torch.nn.Linear` has shape [hidden_size, features].

`b_dec`, `d_in` of the configuration or the model's hidden size say which axis is which where they are known.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import is_integer
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.layouts.layer_names import layer_of_file_name, layer_of_key
from steer_service.formats.layouts.open_file import OpenFile, bad, needs
from steer_service.formats.layouts.stored_array import StoredArray

ROWS = ("W_dec", "w_dec")
"""Names of a decoder of shape [features, hidden_size]."""
COLUMNS = ("decoder.weight", "decoder_linear.weight")
"""Names of a decoder of shape [hidden_size, features]."""
BIASES = ("b_dec", "decoder.bias", "bias", "decoder_bias")

CONFIG = "cfg.json"
WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "params.safetensors", "params.npz")
"""Files in the folder of a sparse autoencoder, of which the first that is there is read."""


def weights_in(folder: Path) -> Path | None:
    """The weights in the folder of a sparse autoencoder; None for another folder."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def config_beside(path: Path) -> Mapping[str, Any] | None:
    """The configuration beside the weights; None if there is none."""
    place = path.parent / CONFIG
    if path.name not in WEIGHTS or not place.is_file():
        return None
    try:
        config = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise bad(f"{CONFIG} beside it is not JSON") from error
    if not isinstance(config, Mapping):
        raise bad(f"{CONFIG} beside it is not an object")
    return config


def sae_layout(file: OpenFile) -> Imported | None:
    """The decoder's vector of the feature that the options name; None for another file."""
    content, key = file.content, None
    if isinstance(content, Mapping):
        key = next((name for name in (*ROWS, *COLUMNS) if name in content), None)
    elif not (isinstance(content, StoredArray) and file.options.feature is not None):
        return None
    if isinstance(content, Mapping) and key is None:
        return None
    decoder = content if key is None else content[key]
    file.options.check_used("feature", "layer")
    if not isinstance(decoder, StoredArray) or len(decoder.shape) != 2:
        raise bad(f"{key or 'the decoder'} is not an array of shape [features, hidden_size]")
    axis = _feature_axis(file, decoder, 1 if key in COLUMNS else 0)
    feature, count = file.options.feature, decoder.shape[axis]
    if feature is None:
        raise needs("feature", f"it has {count} features")
    if feature >= count:
        raise InvalidRequest(f"feature {feature} is outside 0..{count - 1}", reason="OUT_OF_RANGE", field="feature")
    layer, found = _layer(file)
    vector = decoder.vector(feature) if axis == 0 else decoder.vector(slice(None), feature)
    return file.vectors({layer: vector}, "sae", f"feature {feature} of {count}; layer {layer}, {found}")


def _feature_axis(file: OpenFile, decoder: StoredArray, usual: int) -> int:
    """The axis of the features: the one that has not the hidden size, or that of the name if both may."""
    size = _hidden_size(file)
    if size is None:
        return usual
    if size not in decoder.shape:
        raise InvalidRequest(
            f"the decoder has shape {list(decoder.shape)} and the hidden size is {size}",
            reason="WRONG_WIDTH",
            field="path",
        )
    if decoder.shape[0] == decoder.shape[1]:
        return usual
    return 0 if decoder.shape[1] == size else 1


def _hidden_size(file: OpenFile) -> int | None:
    """The model's, or what the file says: the output of a transcoder, the length of the decoder's bias."""
    if file.options.hidden_size is not None:
        return file.options.hidden_size
    biases = [file.content.get(name) for name in BIASES] if isinstance(file.content, Mapping) else []
    for bias in biases:
        if isinstance(bias, StoredArray) and len(bias.shape) == 1:
            return bias.shape[0]
    config = file.config or {}
    size = config.get("d_out", config.get("d_in"))
    return int(size) if is_integer(size) else None


def _layer(file: OpenFile) -> tuple[int, str]:
    if file.options.layer is not None:
        return file.options.layer, "as the option says"
    config = file.config or {}
    metadata = config.get("metadata")
    places = metadata if isinstance(metadata, Mapping) else {}
    for name in ("hook_name_out", "hook_name", "hook_point"):
        hook = places.get(name, config.get(name))
        if isinstance(hook, str) and hook:
            return _layer_of_hook(hook), f"from {name} of {CONFIG}"
    layer = layer_of_file_name(file.path.name)
    if layer is None:
        raise needs("layer", f"neither {CONFIG} beside it nor its name says at which layer it was trained")
    return layer, "from the name of the file"


def _layer_of_hook(hook: str) -> int:
    layer = layer_of_key(hook)
    if layer is None:
        raise bad(f"the hook point {hook!r:.60} is not on the residual stream; expected blocks.N.hook_resid_post")
    return layer
