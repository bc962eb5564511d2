"""`steer vectors sweep`: measures what vectors do to the likelihood of texts, scale by scale."""

import argparse
import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from steer_service.cli.arguments import UsageError
from steer_service.cli.model_choice import ModelChoice, add_model_arguments, model_choice_from, open_model
from steer_service.cli.progress import print_message
from steer_service.cli.scales import add_scales_argument, scales_from
from steer_service.cli.steering_summary import summary_of
from steer_service.cli.vector_options import vector_options_from
from steer_service.cli.vectors.source import add_input, add_layers, bad_input, chosen_part, read_input
from steer_service.core.backend import ModelInfo
from steer_service.core.errors import InvalidRequest
from steer_service.directions.contrast import read_contrast
from steer_service.directions.report import plot_sweep, sweep_table
from steer_service.directions.sweep import sweep_scales
from steer_service.directions.targets import Target, targets_of
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.vector_files import read_vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What `steer vectors sweep` measures."""

    path: Path
    """The file or folder with the vectors."""
    read: Callable[[ModelInfo], Imported]
    """Reads the vectors that are added, for this model."""
    targets: list[Target]
    """Texts whose likelihood is measured."""
    scales: tuple[float, ...]
    """The factors for the vectors."""
    choice: ModelChoice
    """The model."""
    plot: Path | None
    """The file of the plot; None for no plot."""


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer vectors sweep`."""
    add_input(parser)
    parser.add_argument(
        "contrast", metavar="CONTRAST", type=Path, help="JSON lines with positive and negative, as steer train takes"
    )
    add_layers(parser)
    add_scales_argument(parser)
    add_model_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a plot, a .png file")
    parser.set_defaults(parse=_sweep_from, execute=lambda job: asyncio.run(_sweep(job)))


def _sweep_from(namespace: argparse.Namespace) -> Sweep:
    if namespace.plot is not None and not namespace.plot.absolute().parent.is_dir():
        raise UsageError(f"--plot: {namespace.plot.parent} is not a folder")
    if not namespace.contrast.is_file():
        raise UsageError(f"CONTRAST: {namespace.contrast} is not a file")
    _check_file(namespace)
    return Sweep(
        path=namespace.path,
        targets=targets_of(read_contrast(namespace.contrast)),
        scales=scales_from(namespace),
        choice=model_choice_from(namespace),
        plot=namespace.plot,
        read=partial(read_input, namespace),
    )


def _check_file(namespace: argparse.Namespace) -> None:
    """Raises what reading the file raises, before a model is loaded, unless the model may decide it."""
    try:
        chosen_part(namespace, read_vectors(namespace.path, kind=namespace.kind, **vector_options_from(namespace)))
    except InvalidRequest as error:
        if error.reason != "NEEDS_OPTION" or error.field != "rows":
            raise


async def _sweep(job: Sweep) -> int:
    async with open_model(job.choice) as model:
        with bad_input(job.path):
            vectors = job.read(model.calls.info)
            for scale in filter(None, job.scales):
                vectors.to_spec(scale)  # refuses what has no scale, before any work
        print_message(f"steering {summary_of(vectors.to_spec())}, times each scale")
        points = await sweep_scales(model.measure(job.targets), vectors.to_spec, job.scales)
    print(sweep_table(points), flush=True)
    if job.plot is not None:
        plot_sweep(points, job.plot)
    return 0
