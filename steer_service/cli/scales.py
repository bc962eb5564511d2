"""The scales of a sweep on the command line."""

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
        help="factors for the steering whose effect is measured (default: --scales=%(default)s)",
    )


def scales_from(namespace: argparse.Namespace) -> tuple[float, ...]:
    """The scales; raises UsageError for a number that is not finite."""
    scales = []
    for part in namespace.scales.split(","):
        try:
            scales.append(float(part))
        except ValueError:
            raise UsageError(f"--scales: {part!r} is not a number") from None
        if not math.isfinite(scales[-1]):
            raise UsageError(f"--scales: {part.strip()} is not finite")
    return tuple(scales)
