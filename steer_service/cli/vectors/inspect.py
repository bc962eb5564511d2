"""`steer vectors inspect`: prints what a file or folder holds."""

import argparse
import json
from dataclasses import dataclass

import numpy as np

from steer_service.cli.terminal import print_text
from steer_service.cli.vector_options import check_no_vector_options, vector_options_from
from steer_service.cli.vectors.source import FOLDER, add_input
from steer_service.core.specs import AblationSpec, AddScaling, AddSpec, ProjectionCapSpec, SteeringOp, SteeringSpec
from steer_service.directions.report import table
from steer_service.formats.checkpoint import Checkpoint, read_checkpoint
from steer_service.formats.layer_vectors import CONVENTIONS, Imported
from steer_service.formats.layouts.open_file import naming
from steer_service.formats.layouts.sae_decoder import weights_in
from steer_service.formats.vector_files import read_vectors


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `steer vectors inspect` prints."""

    found: Imported | Checkpoint
    """What the file or folder holds."""


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer vectors inspect`."""
    add_input(parser)
    parser.set_defaults(parse=_inspection_from, execute=_inspect)


def _inspection_from(namespace: argparse.Namespace) -> Inspection:
    path, kind = namespace.path, namespace.kind
    if kind == FOLDER or (kind is None and path.is_dir() and weights_in(path) is None):
        check_no_vector_options(namespace, "trained steering says all of its layers")
        with naming(path):
            return Inspection(read_checkpoint(path))
    return Inspection(read_vectors(path, kind=kind, **vector_options_from(namespace)))


def _inspect(job: Inspection) -> int:
    print_text(_description_of(job.found))
    return 0


def _description_of(found: Imported | Checkpoint) -> str:
    if isinstance(found, Checkpoint):
        return _describe_steering(found)
    return _describe_vectors(found) if found.operations is None else _describe_operations(found)


def _describe_vectors(found: Imported) -> str:
    rows = [
        (f"{layer}", f"{vector.size}", f"{np.linalg.norm(vector):.4g}", f"{np.abs(vector).max():.4g}")
        for layer, vector in found.layers.items()
    ]
    head = [f"kind    {found.kind}", f"layers  {found.convention}", f"model   {found.model_hint or 'unknown'}"]
    return "\n".join([*head, "", table(("layer", "size", "norm", "largest"), rows)])


def _describe_operations(found: Imported) -> str:
    head = [f"kind    {found.kind}", f"layers  {found.convention}", ""]
    return "\n".join([*head, _operation_table(found.to_spec())])


def _describe_steering(checkpoint: Checkpoint) -> str:
    model = checkpoint.model
    layers = "" if model.layer_count is None else f", {model.layer_count} layers"
    head = [
        f"kind      {FOLDER}",
        f"layers    {CONVENTIONS[FOLDER]}",
        f"model     {model.name or 'unknown'}, hidden size {model.hidden_size}{layers}",
        f"revision  {model.revision or 'unknown'}",
        f"digest    {checkpoint.spec.digest()}",
        f"about     {json.dumps(dict(checkpoint.about))}",
    ]
    return "\n".join([*head, "", _operation_table(checkpoint.spec)])


def _operation_table(spec: SteeringSpec) -> str:
    rows = [
        (f"{layer}", *_describe_operation(operation))
        for layer, of_layer in spec.layers.items()
        for operation in of_layer.operations
    ]
    return table(("layer", "operation", "vector's norm", "numbers"), rows)


def _describe_operation(operation: SteeringOp) -> tuple[str, str, str]:
    kind, numbers = _kind_and_numbers(operation)
    notes = [numbers]
    if isinstance(operation, AddSpec) and operation.scaling is AddScaling.RELATIVE:
        notes.append("relative to the row's norm")
    if operation.max_relative_change is not None:
        notes.append(f"changes at most {operation.max_relative_change:g} of the row's norm")
    if operation.keep_norm:
        notes.append("keeps the row's norm")
    if operation.positions is not None:
        notes.append("at positions of its own")
    return kind, f"{np.linalg.norm(operation.vector):.4g}", ", ".join(notes)


def _kind_and_numbers(operation: SteeringOp) -> tuple[str, str]:
    match operation:
        case AddSpec():
            return "add", f"scale {operation.scale:g}"
        case ProjectionCapSpec():
            bounds = {"min": operation.min, "max": operation.max}
            return "cap", ", ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)
        case AblationSpec():
            return "ablation", f"scale {operation.scale:g}"
