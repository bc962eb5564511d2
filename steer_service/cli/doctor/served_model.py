"""The model: is it complete, is its family verified, and what does it need?"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_service.cli.doctor.findings import Finding, Status, fail, gib, ok, warn
from steer_service.cli.doctor.host_memory import Need
from steer_service.core.cache_folder import user_cache
from steer_service.core.errors import NotFound
from steer_service.core.verified_architectures import REFUSED_ARCHITECTURES, VERIFIED_ARCHITECTURES
from steer_service.hf.bundled_model import NAME, SERVED_CACHE_BYTES, bundled_model_folder

BUNDLED_BYTES = 270 << 20
"""Weights of the bundled model, before it is converted."""

INDEX = "model.safetensors.index.json"

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
"""Files, one of which a tokenizer has."""

CONVERTERS = ("transformers", "gguf", "torch")
"""Packages that convert the bundled model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model of the command line."""

    name: str
    """As it was given; the name of the bundled one."""
    folder: Path | None
    """Where it is; None for one that is not on this machine, and for the bundled one before it is converted."""
    problem: Finding | None
    """Why it cannot be served, or is not looked at."""
    is_bundled: bool

    @property
    def needs_conversion(self) -> bool:
        """True for a bundled model that the first start converts."""
        return self.is_bundled and self.folder is None

    @property
    def needs_download(self) -> bool:
        """True for a model of a hub that the first start downloads."""
        return self.problem is not None and self.problem.status is Status.WARN

    @property
    def need(self) -> Need | None:
        """What it needs; None if that is not known."""
        if self.is_bundled:
            return Need(weights_bytes=BUNDLED_BYTES, cache_bytes=SERVED_CACHE_BYTES)
        size = weights_of(self.folder) if self.folder is not None else 0
        return Need(weights_bytes=size, cache_bytes=0) if size else None


def find_model(name: str | None, environment: Mapping[str, str]) -> ServedModel:
    """The model that `steer serve NAME` would load, without a network; None is the bundled one."""
    if name is None:
        return _bundled()
    if Path(name).is_dir():
        return ServedModel(name=name, folder=Path(name), problem=None, is_bundled=False)
    if Path(name).exists():
        problem = fail("model", f"{name} is a file; give the folder with config.json and the weights")
    elif is_path(name):
        problem = fail("model", f"there is no folder {name}; give one with config.json, or a name such as org/model")
    else:
        return _from_hub(name, environment)
    return ServedModel(name=name, folder=None, problem=problem, is_bundled=False)


def is_path(model: str) -> bool:
    """True for what cannot be the name of a model on a hub, nor a URL."""
    if "://" in model:
        return False
    return model.count("/") > 1 or model.startswith((".", "~", "/")) or model.endswith("/")


def check_model(model: ServedModel) -> Iterator[Finding]:
    """Whether the folder is complete, and whether its family is verified."""
    if model.problem is not None:
        yield model.problem
        return
    if model.folder is None:
        yield ok("model", f"{model.name}, which the first start converts (about half a minute)")
        return
    try:
        config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"it is not JSON: {error}"
        yield fail("model", f"{model.folder / 'config.json'} cannot be read: {why}; give the folder of a model")
        return
    yield _family(config)
    yield _weights(model.folder)
    if not any((model.folder / name).exists() for name in TOKENIZERS):
        yield fail("tokenizer", f"{model.folder} has none of {', '.join(TOKENIZERS)}; save the model's tokenizer there")


def weights_of(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        size = sum(path.stat().st_size for path in folder.glob(pattern))
        if size:
            return size
    return 0


def _bundled() -> ServedModel:
    problem, folder = None, None
    try:
        place = bundled_model_folder()
        folder = place if place.is_dir() else None
        missing = [name for name in CONVERTERS if folder is None and importlib.util.find_spec(name) is None]
        if missing:
            problem = fail(
                "model",
                f"{NAME} is converted with {missing[0]}, which is not installed; run: "
                "pip install 'steerllm[huggingface]', or give a MODEL",
            )
    except NotFound as error:
        problem = fail("model", f"{error.message}, or give a MODEL")
    return ServedModel(name=NAME, folder=folder, problem=problem, is_bundled=True)


def _from_hub(name: str, environment: Mapping[str, str]) -> ServedModel:
    home = Path(environment.get("HF_HOME") or user_cache(environment) / "huggingface")
    hub = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    snapshots = (hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json")
    newest = max(snapshots, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None:
        return ServedModel(name=name, folder=newest.parent, problem=None, is_bundled=False)
    if environment.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        problem = fail(
            "model",
            f"{name} is neither a folder nor in {hub}, and HF_HUB_OFFLINE forbids a download; copy it there",
        )
    else:
        problem = warn(
            "model",
            f"{name} is neither a folder nor in {hub}: the first start downloads it; give a folder if not",
        )
    return ServedModel(name=name, folder=None, problem=problem, is_bundled=False)


def _family(config: Any) -> Finding:
    named = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        return fail("model", "config.json names no architecture; give the folder of a model that transformers saved")
    architecture = named[0]
    if architecture in VERIFIED_ARCHITECTURES:
        return ok("model", f"{architecture} is a verified family")
    if architecture in REFUSED_ARCHITECTURES:
        return fail("model", f"{architecture} was tried and is refused, see docs/models.md; choose a verified family")
    return warn(
        "model",
        f"{architecture} is not among the {len(VERIFIED_ARCHITECTURES)} verified architectures of docs/models.md; "
        "`steer serve` refuses it if its layers are of no verified class, and --steer-allow-unverified says what they "
        "return",
    )


def _weights(folder: Path) -> Finding:
    index = folder / INDEX
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).exists())
        if missing:
            return fail("weights", f"{len(missing)} of {len(named)} files are missing, such as {missing[0]}; copy them")
    size = gib(weights_of(folder))
    if any(folder.glob("*.safetensors")):
        return ok("weights", f"{size} of safetensors")
    if any(folder.glob("*.bin")) or any(folder.glob("*.gguf")):
        return warn("weights", f"{size}, not as safetensors; vLLM may load them; save them as safetensors to be sure")
    return fail("weights", f"{folder} has no *.safetensors; give the folder that has the weights")
