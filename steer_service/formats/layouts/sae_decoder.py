"""One feature of a sparse autoencoder: its row of the decoder, as a vector.

* SAELens (6.54): a folder with `sae_weights.safetensors` and `cfg.json`. `W_dec` has shape [features, hidden_size]
  (saes/sae.py). The configuration has `hook_name`, in `metadata` since version 6, and for transcoders `hook_name_out`.
* Gemma Scope: `params.npz` with `W_dec`, or `params.safetensors` with `w_dec`, of the same shape.
* EleutherAI's sparsify (1.3): `sae.safetensors` with `W_dec`, in a folder that has the name of the hook point, such as
  `layers.5`: the output of that module of the base model (trainer.py, a forward hook). `cfg.json` does not have it.
* dictionary_learning (0.1): `ae.pt` with `decoder.weight` of a `torch.nn.Linear`, shape [hidden_size, features].
  `config.json` has `layer` and `submodule_name`, which is `resid_post_layer_5` for the output of layer 5 (training.py,
  `trainSAE`; the names are those of its demo). Other names are other places, or say nothing.

`b_dec`, `d_in` of the configuration or the model's hidden size say which axis is which where they are known.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_layer, is_integer
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.layouts.layer_names import layer_of_file_name, layer_of_key
from steer_service.formats.layouts.open_file import OpenFile, bad, needs
from steer_service.formats.layouts.stored_array import StoredArray
from steer_service.formats.unique_json import parse_json

ROWS = ("W_dec", "w_dec")
"""Names of a decoder of shape [features, hidden_size]."""
COLUMNS = ("decoder.weight", "decoder_linear.weight")
"""Names of a decoder of shape [hidden_size, features]."""
BIASES = ("b_dec", "decoder.bias", "bias", "decoder_bias")

CONFIG = "cfg.json"
SPARSIFY = "sae.safetensors"
DICTIONARY_LEARNING, ITS_CONFIG = "ae.pt", "config.json"
WEIGHTS = ("sae_weights.safetensors", SPARSIFY, "params.safetensors", "params.npz", DICTIONARY_LEARNING)
"""Files in the folder of a sparse autoencoder, of which the first that is there is read."""


def weights_in(folder: Path) -> Path | None:
    """The weights in the folder of a sparse autoencoder; None for another folder."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def config_beside(path: Path) -> Mapping[str, Any] | None:
    """The configuration beside the weights; None if there is none."""
    name = ITS_CONFIG if path.name == DICTIONARY_LEARNING else CONFIG
    place = path.parent / name
    if path.name not in WEIGHTS or not place.is_file():
        return None
    try:
        config = parse_json(place.read_bytes(), field="path")
    except InvalidRequest:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise bad(f"{name} beside it is not JSON") from error
    if not isinstance(config, Mapping):
        raise bad(f"{name} beside it is not an object")
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
    if file.path.name == DICTIONARY_LEARNING:
        return _layer_of_trainer(config.get("trainer")), f"from {ITS_CONFIG}"
    if file.path.name == SPARSIFY and "." in file.path.absolute().parent.name:
        layer = layer_of_key(file.path.absolute().parent.name)
        if layer is not None:
            return layer, "from the name of the folder"
    layer = layer_of_file_name(file.path.name)
    if layer is None:
        raise needs("layer", f"neither {CONFIG} beside it nor its name says at which layer it was trained")
    return layer, "from the name of the file"


def _layer_of_trainer(trainer: Any) -> int:
    """The layer in the `config.json` of dictionary_learning; raises InvalidRequest if it names another place."""
    found = trainer if isinstance(trainer, Mapping) else {}
    layer: Any = found.get("layer")
    place = found.get("submodule_name")
    if not isinstance(place, str) or not is_integer(layer):
        raise needs("layer", f"{ITS_CONFIG} beside it has no layer with the name of its place, resid_post_layer_N")
    if place != f"resid_post_layer_{layer}":
        raise bad(f"{ITS_CONFIG} says {place!r:.60}, which is not the residual stream after layer {layer}")
    with within("layer"):
        check_layer(layer)
    return int(layer)


def _layer_of_hook(hook: str) -> int:
    layer = layer_of_key(hook)
    if layer is None:
        raise bad(f"the hook point {hook!r:.60} is not on the residual stream; expected blocks.N.hook_resid_post")
    return layer
