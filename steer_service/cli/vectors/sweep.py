"""`steer vectors sweep`: measures what vectors do to the likelihood of texts, scale by scale."""

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path

from steer_service.cli.arguments import UsageError
from steer_service.cli.model_choice import ModelChoice, add_model_arguments, model_choice_from, open_model
from steer_service.cli.scales import add_scales_argument, scales_from
from steer_service.cli.vectors.source import add_input, add_layers, read_input
from steer_service.directions.contrast import read_contrast
from steer_service.directions.report import plot_sweep, sweep_table
from steer_service.directions.sweep import sweep_scales
from steer_service.directions.targets import Target, targets_of
from steer_service.formats.layer_vectors import Imported


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What `steer vectors sweep` measures."""

    vectors: Imported
    """The vectors that are added."""
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
    return Sweep(
        targets=targets_of(read_contrast(namespace.contrast)),
        scales=scales_from(namespace),
        choice=model_choice_from(namespace),
        plot=namespace.plot,
        vectors=read_input(namespace),
    )


async def _sweep(job: Sweep) -> int:
    async with open_model(job.choice) as model:
        points = await sweep_scales(model.measure(job.targets), job.vectors.to_spec, job.scales)
    print(sweep_table(points), flush=True)
    if job.plot is not None:
        plot_sweep(points, job.plot)
    return 0
