"""The steering that a command line gives: a JSON document, a folder, or a file of vectors."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer_client import SteerClient
from steer_client.channel import ClientOptions
from steer_service.cli.arguments import UsageError, positions_from
from steer_service.cli.connection import connection_from
from steer_service.cli.progress import print_message
from steer_service.cli.steering_summary import summary_of
from steer_service.cli.vector_options import add_vector_options, check_no_vector_options, vector_options_from
from steer_service.core.backend import ModelInfo
from steer_service.core.errors import InvalidRequest, SteerError, within
from steer_service.core.scaled_spec import scaled_spec
from steer_service.core.specs import SteeringSpec
from steer_service.directions.contrast import SIDES
from steer_service.formats.checkpoint import DIRECTIONS, load_spec
from steer_service.formats.layouts.file_content import container_of
from steer_service.formats.layouts.open_file import naming
from steer_service.formats.layouts.sae_decoder import weights_in
from steer_service.formats.spec_json import spec_from_text
from steer_service.formats.vector_files import read_vectors

NO_FILE = "it is for --steering with a file of vectors"

EXPECTED = "a JSON document of a spec, a folder that `steer train` wrote, or a file of vectors"
"""What --steering takes."""


def add_steering_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the steering, its positions, and what a file of vectors does not say."""
    parser.add_argument(
        "--steering",
        metavar="FILE|FOLDER|JSON",
        help="steering to apply: a JSON document or a file with one, trained steering (a folder that `steer train` "
        "wrote), or a file of vectors",
    )
    parser.add_argument("--steer-positions", metavar="POSITIONS", help="positions to steer (default: all)")
    parser.add_argument("--scale", metavar="S", type=float, help="factor for every addition (default: 1)")
    add_vector_options(parser)


def steering_of(namespace: argparse.Namespace) -> SteeringSpec | None:
    """The spec that the command line gives, for the positions that it gives; raises UsageError or InvalidRequest.

    Prints what the steering of a file or a folder does, which the command line does not show.
    """
    option, positions = "--steer-positions", namespace.steer_positions
    if namespace.steering is None:
        check_no_vector_options(namespace, NO_FILE)
        for name, given in ((option, positions), ("--scale", namespace.scale)):
            if given is not None:
                raise UsageError(f"{name} needs --steering")
        return None
    spec = _spec_of(namespace)
    if positions is not None and spec.positions is not None:
        raise UsageError(f"{option}: the steering document has positions already")
    if positions is not None:
        with within("steering.positions"):
            spec = replace(spec, positions=positions_from(option, positions))
    if not _is_document(namespace.steering):
        print_message(f"steering {summary_of(spec)}")
    return spec


def _spec_of(namespace: argparse.Namespace) -> SteeringSpec:
    argument: str = namespace.steering
    text, place = _document(argument), Path(argument)
    if text is None and not (place.is_dir() and weights_in(place) is None):
        return _from_vectors(namespace, place)
    check_no_vector_options(namespace, _no_file(place, text))
    if text is None:
        with naming(place):
            spec = load_spec(argument)
    elif _is_document(argument):
        spec = spec_from_text(text)
    else:
        _check_json(place, text)
        with naming(place):
            spec = spec_from_text(text, place.parent)
    try:
        return scaled_spec(spec, _scale_from(namespace))
    except InvalidRequest as error:
        raise UsageError(f"--scale: {error.message}") from error


def _no_file(place: Path, text: str | None) -> str:
    """Why options of a file of vectors are refused; `text` is that of a JSON document, None for a folder."""
    if text is None and (place / DIRECTIONS).is_file():
        return f"{NO_FILE}; this folder has one: {place / DIRECTIONS}"
    return NO_FILE


def _check_json(place: Path, text: str) -> None:
    """Raises UsageError, with the whole path, for the text of a file that is not one JSON document."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        if _is_contrast(text):
            raise UsageError(
                f"--steering: {place} has pairs of prompts; it is a file for `steer train`, which makes steering of it"
            ) from error
        raise UsageError(f"--steering: {place} is not JSON: {error}; expected {EXPECTED}") from error


def _is_contrast(text: str) -> bool:
    try:
        first: Any = json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and not first.keys().isdisjoint(SIDES)


def _scale_from(namespace: argparse.Namespace) -> float:
    scale = 1.0 if namespace.scale is None else float(namespace.scale)
    if not math.isfinite(scale):
        raise UsageError(f"--scale: {scale} is not finite")
    return scale


def _is_document(argument: str) -> bool:
    return argument.lstrip().startswith("{")


def _document(argument: str) -> str | None:
    """The JSON document that the argument is, or that its file holds; None for a folder or a file of vectors."""
    if _is_document(argument):
        return argument
    place = Path(argument)
    if place.is_dir():
        return None
    try:
        if not place.is_file():
            raise UsageError(f"--steering: {argument} is neither a JSON object nor a readable file")
        if container_of(place) != "json":
            return None
        text = place.read_text(encoding="utf-8")
    except InvalidRequest:  # no kind of file that is known
        return _text_of(place)
    except (OSError, ValueError) as error:
        raise UsageError(f"--steering: {argument} is neither a JSON object nor a readable file") from error
    return text if _is_spec(text) or not _is_vectors(place) else None


def _text_of(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--steering: {place} is neither JSON, a folder nor a file of vectors") from error


def _is_spec(text: str) -> bool:
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError):
        return True  # whose error says where it is no JSON
    return isinstance(document, dict) and "layers" in document


def _is_vectors(place: Path) -> bool:
    try:
        read_vectors(place)
    except InvalidRequest as error:
        return error.reason != "UNKNOWN_LAYOUT"
    return True


def _from_vectors(namespace: argparse.Namespace, place: Path) -> SteeringSpec:
    scale = _scale_from(namespace)
    found = read_vectors(place, **vector_options_from(namespace, _served_model(namespace)))
    print_message(f"{place} is read as {found.kind}: {found.convention}")
    if len(found.layers) > 1:
        print_message(f"it has {len(found.layers)} layers, which are all steered; --layer N steers one of them alone")
    return found.to_spec(scale)


def _served_model(namespace: argparse.Namespace) -> ModelInfo | None:
    """The model of the server; None if no server answers, which the request itself will report."""
    connection = connection_from(namespace)
    options: ClientOptions = {**connection.options, "unary_timeout_s": 2.0}
    try:
        with SteerClient(connection.address, **options) as client:
            return client.info
    except SteerError:
        return None
