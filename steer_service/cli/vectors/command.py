"""`steer vectors inspect|convert|sweep`: the command line."""

import argparse
from functools import partial

from steer_service.cli.run_command import run_command
from steer_service.cli.vectors.convert import add_convert
from steer_service.cli.vectors.inspect import add_inspect
from steer_service.cli.vectors.sweep import add_sweep
from steer_service.formats.layer_vectors import CONVENTIONS

KINDS = "\n".join(f"  {kind:<17} {convention}" for kind, convention in CONVENTIONS.items())

DESCRIPTION = f"""\
Reads steering vectors from a file or folder of one of these kinds:

{KINDS}

The kind is found from the content; --from demands one. What a file does not say, such as the layer of a single vector,
is never guessed: --layer, --rows, --position, --feature and --experiment say it. A file that contains code is refused,
and its code is never run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer vectors`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add_inspect(actions.add_parser("inspect", help="print what a file or folder holds"))
    add_convert(actions.add_parser("convert", help="write vectors as another kind of file"))
    add_sweep(actions.add_parser("sweep", help="measure the effect on the likelihood of texts, scale by scale"))


def run(namespace: argparse.Namespace) -> int:
    """Executes the command line and returns the exit status."""
    return run_command(partial(namespace.parse, namespace), namespace.execute)
