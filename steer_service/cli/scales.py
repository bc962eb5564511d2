"""The scales of a sweep, as a command line names them."""

import argparse
import math

from steer_service.cli.arguments import UsageError

DEFAULT = "-2,-1,-0.5,0,0.5,1,2"


def add_scales_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the scales."""
    parser.add_argument(
        "--scales",
        metavar="SCALES",
        default=DEFAULT,
        help="what steering is multiplied by to measure its effect (default: --scales=%(default)s)",
    )


def scales_from(namespace: argparse.Namespace) -> tuple[float, ...]:
    """The scales; raises UsageError for what is no finite number."""
    scales = []
    for part in namespace.scales.split(","):
        try:
            scales.append(float(part))
        except ValueError:
            raise UsageError(f"--scales: {part!r} is not a number") from None
        if not math.isfinite(scales[-1]):
            raise UsageError(f"--scales: {part.strip()} is not finite")
    return tuple(scales)
