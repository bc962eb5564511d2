"""What a command line says of a file of vectors that its content does not say."""

import argparse
from typing import TypedDict

from steer_service.cli.arguments import UsageError
from steer_service.core.backend import ModelInfo
from steer_service.formats.layouts.read_options import RowOrder


class VectorOptions(TypedDict, total=False):
    """Arguments of `read_vectors`."""

    layer: int
    rows: RowOrder
    position: int
    feature: int
    experiment: str
    layer_count: int
    hidden_size: int


OPTIONS = ("layer", "rows", "position", "feature", "experiment", "layer_count")
"""Names of the options in a parsed command line."""


def add_vector_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that decide what a file of vectors does not say."""
    group = parser.add_argument_group("a file of vectors", "What its content does not say; see docs/vector_files.md.")
    group.add_argument(
        "--layer", metavar="N", type=int, help="the layer of a file with one vector, or the only one to read"
    )
    group.add_argument(
        "--rows",
        choices=[order.value for order in RowOrder],
        help="order of rows by layer: row L is after layer L, or row 0 is the embeddings",
    )
    group.add_argument(
        "--position", metavar="N", type=int, help="index of the position in an array by position; -1 is the last one"
    )
    group.add_argument("--feature", metavar="N", type=int, help="the feature of a sparse autoencoder")
    group.add_argument("--experiment", metavar="ID", help="the experiment of a capping configuration")
    group.add_argument(
        "--layer-count", metavar="N", type=int, help="number of decoder layers (default: the model's, if there is one)"
    )


def vector_options_from(namespace: argparse.Namespace, info: ModelInfo | None = None) -> VectorOptions:
    """The options as `read_vectors` takes them, with what `info` says of the model."""
    model: VectorOptions = {}
    if info is not None:
        model = {"layer_count": info.layer_count, "hidden_size": info.hidden_size}
    given = {name: getattr(namespace, name) for name in OPTIONS if getattr(namespace, name) is not None}
    return {**model, **given}  # type: ignore[typeddict-item]  # argparse made them of these types


def check_no_vector_options(namespace: argparse.Namespace, why: str) -> None:
    """Raises UsageError for an option that was given; `why` says that there is no file of vectors."""
    for name in OPTIONS:
        if getattr(namespace, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: {why}")
