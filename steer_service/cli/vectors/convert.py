"""`steer vectors convert`: writes vectors as another kind of file."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steer_service.cli.arguments import UsageError
from steer_service.cli.progress import print_message
from steer_service.cli.vectors.source import FOLDER, add_input, add_layers, bad_input, kind_from, read_input
from steer_service.core.errors import InvalidRequest
from steer_service.formats.checkpoint import Checkpoint, SavedModel, write_checkpoint
from steer_service.formats.layer_vectors import CONVENTIONS, Imported
from steer_service.formats.vector_files import WRITERS, write_vectors

BY_SUFFIX = {".gguf": "gguf", ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", "": FOLDER}
"""Ending of a name -> the kind that is written unless --to gives another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `steer vectors convert` writes."""

    path: Path
    """The file or folder that was read."""
    vectors: Imported
    """The vectors of the chosen layers."""
    scale: float
    """The factor for every vector."""
    out: Path
    """The file or folder to write."""
    kind: str
    """The kind to write."""
    model_name: str
    """Name or type of the model, for kinds that have a place for it."""


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer vectors convert`."""
    add_input(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument(
        "--to",
        metavar="KIND",
        type=kind_from,
        choices=[*WRITERS, FOLDER],
        help="the kind to write (default: by the ending of OUT)",
    )
    add_layers(parser)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for every vector (default: %(default)g)")
    parser.add_argument(
        "--model-name", metavar="NAME", help="the model's name in the file (default: the name that was read)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(parse=_conversion_from, execute=_convert)


def _conversion_from(namespace: argparse.Namespace) -> Conversion:
    if not math.isfinite(namespace.scale):
        raise UsageError(f"--scale: {namespace.scale} is not finite")
    kind = namespace.to or BY_SUFFIX.get(namespace.out.suffix.lower())
    if kind is None:
        raise UsageError(f"OUT: {namespace.out} has no known ending; --to chooses the kind")
    if not namespace.out.absolute().parent.is_dir():
        raise UsageError(f"OUT: {namespace.out.parent} is not a folder")
    if namespace.out.exists() and not namespace.overwrite:
        raise UsageError(f"OUT: {namespace.out} exists already; --overwrite replaces it")
    if namespace.out.exists() and namespace.out.is_dir() != (kind == FOLDER):
        raise UsageError(f"OUT: {namespace.out} is {'a folder' if namespace.out.is_dir() else 'a file'}")
    found = read_input(namespace)
    if found.operations is not None and kind != FOLDER:
        raise UsageError(f"--to: {kind} has additions only, and this file has other operations; --to {FOLDER} has them")
    return Conversion(
        path=namespace.path,
        vectors=found,
        scale=namespace.scale,
        out=namespace.out,
        kind=kind,
        model_name=_model_name(namespace.model_name, found, kind),
    )


def _model_name(given: str | None, found: Imported, kind: str) -> str:
    if given is not None:
        return given
    is_known = kind != FOLDER or found.kind == FOLDER  # elsewhere it is a type, such as llama, and no model's name
    return found.model_hint if is_known else ""


def _convert(job: Conversion) -> int:
    with bad_input(job.path):
        if job.kind == FOLDER:
            _write_folder(job)
        else:
            layers = {layer: np.float32(job.scale) * vector for layer, vector in job.vectors.layers.items()}
            write_vectors(job.out, layers, kind=job.kind, model_hint=job.model_name)
    print_message(f"{job.out} is {job.kind}: {CONVENTIONS[job.kind]}")
    return 0


def _write_folder(job: Conversion) -> None:
    spec = job.vectors.to_spec(job.scale)
    size = next((one.vector.size for layer in spec.layers.values() for one in layer.operations), None)
    if size is None:
        raise InvalidRequest("every vector is zero", reason="ZERO_NORM", field="path")
    write_checkpoint(job.out, Checkpoint(spec=spec, model=SavedModel(name=job.model_name, hidden_size=size)))
