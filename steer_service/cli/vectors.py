"""`steer vectors inspect|convert|sweep`: steering vectors in the files that people have."""

import argparse
import asyncio
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from steer_service.cli.arguments import UsageError, layers_from
from steer_service.cli.command import run_command
from steer_service.cli.model_choice import ModelChoice, add_model_arguments, model_choice_from, open_model
from steer_service.cli.progress import say
from steer_service.cli.scales import add_scales_argument, scales_from
from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec, SteeringOp
from steer_service.directions.contrast import read_contrast
from steer_service.directions.report import plot_sweep, sweep_table, table
from steer_service.directions.sweep import sweep_scales
from steer_service.directions.targets import Target, targets_of
from steer_service.formats.checkpoint import Checkpoint, SavedModel, read_checkpoint, write_checkpoint
from steer_service.formats.layer_vectors import CONVENTIONS, Imported
from steer_service.formats.vector_files import WRITERS, read_vectors, write_vectors

FOLDER = "checkpoint"
"""The kind that is a folder."""

BY_SUFFIX = {".gguf": "gguf", ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", "": FOLDER}
"""Ending of a name -> the kind that is written to it unless another is asked for."""

KINDS = "\n".join(f"  {kind:<17} {convention}" for kind, convention in CONVENTIONS.items())

DESCRIPTION = f"""\
Reads steering vectors from a file or folder of one of these kinds:

{KINDS}

The kind is found out from the name and the content; where it cannot be, --from says it. Files with code in them are
refused before it runs.
"""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `steer vectors inspect` shows."""

    path: Path
    """The file or folder."""
    kind: str | None
    """Its kind, if it was named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `steer vectors convert` writes."""

    vectors: Imported
    """What was read, the layers that were chosen."""
    scale: float
    """What every vector is multiplied by."""
    out: Path
    """Where it goes."""
    kind: str
    """Kind of what is written."""
    model_name: str
    """Name or type of the model, for kinds that have a place for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What `steer vectors sweep` measures."""

    vectors: Imported
    """What is added."""
    targets: list[Target]
    """Texts whose likelihood is measured."""
    scales: tuple[float, ...]
    """What the vectors are multiplied by."""
    choice: ModelChoice
    """On which model."""
    plot: Path | None
    """Where the plot goes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `steer vectors` takes to `parser`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_inspect(actions.add_parser("inspect", help="say what is in a file or folder"))
    _add_convert(actions.add_parser("convert", help="write it as another kind"))
    _add_sweep(actions.add_parser("sweep", help="measure what it does to the likelihood of texts, scale by scale"))


def run(namespace: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit status."""
    return run_command(partial(namespace.parse, namespace), namespace.execute)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="a file of vectors, or a folder with steering")
    parser.add_argument("--from", metavar="KIND", dest="kind", choices=CONVENTIONS, help="its kind")


def _add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", metavar="LAYERS", help="only these layers, such as 3,7-9 (default: all)")


def _read(namespace: argparse.Namespace) -> Imported:
    """The vectors, of the chosen layers; says which convention was assumed."""
    found = read_vectors(namespace.path, kind=namespace.kind)
    say(f"{namespace.path} is read as {found.kind}: {found.convention}")
    if namespace.layers is None:
        return found
    chosen = layers_from("--layers", namespace.layers)
    missing = [layer for layer in chosen if layer not in found.layers]
    if missing:
        raise UsageError(f"--layers: {namespace.path} has no vector for layer {missing[0]}")
    return replace(found, layers={layer: found.layers[layer] for layer in chosen})


# -- inspect -----------------------------------------------------------------------------------------------------------


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.set_defaults(parse=lambda namespace: Inspection(namespace.path, namespace.kind), execute=_inspect)


def _inspect(job: Inspection) -> int:
    is_folder = job.kind == FOLDER or (job.kind is None and job.path.is_dir())
    print(
        _describe_steering(job.path) if is_folder else _describe_vectors(read_vectors(job.path, kind=job.kind)),
        flush=True,
    )
    return 0


def _describe_vectors(found: Imported) -> str:
    rows = [
        (f"{layer}", f"{vector.size}", f"{np.linalg.norm(vector):.4g}", f"{np.abs(vector).max():.4g}")
        for layer, vector in found.layers.items()
    ]
    head = [f"kind    {found.kind}", f"layers  {found.convention}", f"model   {found.model_hint or 'not said'}"]
    return "\n".join([*head, "", table(("layer", "width", "norm", "largest"), rows)])


def _describe_steering(folder: Path) -> str:
    checkpoint = read_checkpoint(folder)
    model = checkpoint.model
    layers = "" if model.layer_count is None else f", {model.layer_count} layers"
    head = [
        f"kind      {FOLDER}",
        f"layers    {CONVENTIONS[FOLDER]}",
        f"model     {model.name or 'not said'}, width {model.hidden_size}{layers}",
        f"revision  {model.revision or 'not said'}",
        f"digest    {checkpoint.spec.digest()}",
        f"about     {json.dumps(dict(checkpoint.about))}",
    ]
    rows = [
        (f"{layer}", *_describe_operation(operation))
        for layer, spec in checkpoint.spec.layers.items()
        for operation in spec.operations
    ]
    return "\n".join([*head, "", table(("layer", "operation", "vector's norm", "numbers"), rows)])


def _describe_operation(operation: SteeringOp) -> tuple[str, str, str]:
    norm = f"{np.linalg.norm(operation.vector):.4g}"
    match operation:
        case AddSpec():
            return "add", norm, f"scale {operation.scale:g}"
        case ProjectionCapSpec():
            bounds = {"min": operation.min, "max": operation.max}
            return "cap", norm, ", ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)
        case AblationSpec():
            return "ablation", norm, f"scale {operation.scale:g}"


# -- convert -----------------------------------------------------------------------------------------------------------


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="where it goes")
    parser.add_argument(
        "--to", metavar="KIND", choices=[*WRITERS, FOLDER], help="the kind to write (default: by the ending of OUT)"
    )
    _add_layers(parser)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="what every vector is multiplied by (default: %(default)g)"
    )
    parser.add_argument(
        "--model-name", metavar="NAME", help="what the file says of the model (default: what was read of it)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(parse=_conversion_from, execute=_convert)


def _conversion_from(namespace: argparse.Namespace) -> Conversion:
    if not math.isfinite(namespace.scale):
        raise UsageError(f"--scale: {namespace.scale} is not finite")
    kind = namespace.to or BY_SUFFIX.get(namespace.out.suffix.lower())
    if kind is None:
        raise UsageError(f"OUT: {namespace.out} does not say what to write; --to does")
    if not namespace.out.absolute().parent.is_dir():
        raise UsageError(f"OUT: {namespace.out.parent} is not a folder")
    if namespace.out.exists() and not namespace.overwrite:
        raise UsageError(f"OUT: {namespace.out} is there already; --overwrite replaces it")
    if namespace.out.exists() and namespace.out.is_dir() != (kind == FOLDER):
        raise UsageError(f"OUT: {namespace.out} is {'a folder' if namespace.out.is_dir() else 'a file'}")
    found = _read(namespace)
    return Conversion(
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
    layers = {layer: np.float32(job.scale) * vector for layer, vector in job.vectors.layers.items()}
    if job.kind == FOLDER:
        model = SavedModel(name=job.model_name, hidden_size=next(iter(layers.values())).size)
        spec = replace(job.vectors, layers=layers).to_spec()
        write_checkpoint(job.out, Checkpoint(spec=spec, model=model))
    else:
        write_vectors(job.out, layers, kind=job.kind, model_hint=job.model_name)
    say(f"{job.out} is {job.kind}: {CONVENTIONS[job.kind]}")
    return 0


# -- sweep -------------------------------------------------------------------------------------------------------------


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument(
        "contrast", metavar="CONTRAST", type=Path, help="JSON lines with positive and negative, as steer train takes"
    )
    _add_layers(parser)
    add_scales_argument(parser)
    add_model_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a plot, a .png file")
    parser.set_defaults(parse=_sweep_from, execute=lambda job: asyncio.run(_sweep(job)))


def _sweep_from(namespace: argparse.Namespace) -> Sweep:
    if namespace.plot is not None and not namespace.plot.absolute().parent.is_dir():
        raise UsageError(f"--plot: {namespace.plot.parent} is not a folder")
    if not namespace.contrast.is_file():
        raise UsageError(f"CONTRAST: {namespace.contrast} is not a file")
    return Sweep(
        targets=targets_of(read_contrast(namespace.contrast)),
        scales=scales_from(namespace),
        choice=model_choice_from(namespace),
        plot=namespace.plot,
        vectors=_read(namespace),
    )


async def _sweep(job: Sweep) -> int:
    async with open_model(job.choice) as model:
        points = await sweep_scales(model.measure(job.targets), job.vectors.to_spec, job.scales)
    print(sweep_table(points), flush=True)
    if job.plot is not None:
        plot_sweep(points, job.plot)
    return 0
