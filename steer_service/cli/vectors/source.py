"""The file or folder that every action of `steer vectors` reads."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer_service.cli.arguments import UsageError, layers_from
from steer_service.cli.progress import print_message
from steer_service.cli.vector_options import add_vector_options, vector_options_from
from steer_service.core.backend import ModelInfo
from steer_service.core.errors import InvalidRequest
from steer_service.formats.layer_vectors import ALIASES, CONVENTIONS, TRAINED, Imported
from steer_service.formats.layouts.open_file import naming
from steer_service.formats.vector_files import read_vectors

FOLDER = TRAINED
"""The kind that is a folder."""


def add_input(parser: argparse.ArgumentParser) -> None:
    """Adds the path and its kind."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a file of vectors, or a folder with trained steering")
    parser.add_argument(
        "--from",
        metavar="KIND",
        dest="kind",
        type=kind_from,
        choices=CONVENTIONS,
        help="kind of the file (default: from its content)",
    )
    add_vector_options(parser)


def kind_from(name: str) -> str:
    """The kind that the command line names; older scripts have other names for some."""
    return ALIASES.get(name, name)


@contextmanager
def bad_input(path: Path) -> Iterator[None]:
    """Turns what is raised for the file or an option into a UsageError, however late: the exit status is 2."""
    try:
        with naming(path):
            yield
    except InvalidRequest as error:
        raise UsageError(str(error)) from error


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of layers."""
    parser.add_argument("--layers", metavar="LAYERS", help="only these layers, such as 3,7-9 (default: all)")


def read_input(namespace: argparse.Namespace, info: ModelInfo | None = None) -> Imported:
    """The steering of the chosen layers; prints which convention for layers was found. `info` is of the model."""
    found = read_vectors(namespace.path, kind=namespace.kind, **vector_options_from(namespace, info))
    print_message(f"{namespace.path} is read as {found.kind}: {found.convention}")
    return chosen_part(namespace, found)


def chosen_part(namespace: argparse.Namespace, found: Imported) -> Imported:
    """The part at the layers that the command line chooses."""
    if namespace.layers is None:
        return found
    chosen = layers_from("--layers", namespace.layers)
    missing = [layer for layer in chosen if layer not in found.layer_numbers]
    if missing:
        raise UsageError(f"--layers: {namespace.path} has no vector for layer {missing[0]}")
    return found.at_layers(chosen)
