"""The file or folder that every action of `steer vectors` reads."""

import argparse
from dataclasses import replace
from pathlib import Path

from steer_service.cli.arguments import UsageError, layers_from
from steer_service.cli.progress import print_message
from steer_service.formats.layer_vectors import CONVENTIONS, Imported
from steer_service.formats.vector_files import read_vectors

FOLDER = "checkpoint"
"""The kind that is a folder."""


def add_input(parser: argparse.ArgumentParser) -> None:
    """Adds the path and its kind."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a file of vectors, or a folder with steering")
    parser.add_argument(
        "--from",
        metavar="KIND",
        dest="kind",
        choices=CONVENTIONS,
        help="kind of the file (default: from its name and content)",
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of layers."""
    parser.add_argument("--layers", metavar="LAYERS", help="only these layers, such as 3,7-9 (default: all)")


def read_input(namespace: argparse.Namespace) -> Imported:
    """The vectors of the chosen layers; prints which convention for layers was assumed."""
    found = read_vectors(namespace.path, kind=namespace.kind)
    print_message(f"{namespace.path} is read as {found.kind}: {found.convention}")
    if namespace.layers is None:
        return found
    chosen = layers_from("--layers", namespace.layers)
    missing = [layer for layer in chosen if layer not in found.layers]
    if missing:
        raise UsageError(f"--layers: {namespace.path} has no vector for layer {missing[0]}")
    return replace(found, layers={layer: found.layers[layer] for layer in chosen})
