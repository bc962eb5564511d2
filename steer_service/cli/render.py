"""`steer render PROMPT`: prints the tokens of a prompt as the model of a running server gets them."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from steer_client import SteerClient
from steer_service.cli.arguments import add_truncation_argument
from steer_service.cli.connection import add_connection_arguments, connection_from
from steer_service.cli.prompt_arguments import add_prompt_arguments, prompt_of
from steer_service.cli.run_command import run_command
from steer_service.cli.terminal import print_text
from steer_service.core.prompt import Prompt
from steer_service.core.prompt_tokens import PromptTokens

DESCRIPTION = """\
Shows PROMPT as the model of a running server gets it. Nothing is generated.

Each line has the position of a token and its id. Then come its place in the text (first character and the one after the
last), the message to which it belongs, and its text as a JSON string. Special tokens are marked with *. What is not
known is -.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer render`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_prompt_arguments(parser, "the text to show")
    add_connection_arguments(parser)
    parser.add_argument(
        "--model", metavar="NAME", default="", help="the served model or one of its adapters (default: the model)"
    )
    add_truncation_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, which also has the whole text")


def run(namespace: argparse.Namespace) -> int:
    """Executes the command line and returns the exit status."""
    return run_command(partial(_prompt_from, namespace), partial(_execute, namespace))


def _prompt_from(namespace: argparse.Namespace) -> Prompt:
    connection_from(namespace)
    return prompt_of(namespace)


def _execute(namespace: argparse.Namespace, prompt: Prompt) -> int:
    connection = connection_from(namespace)
    with SteerClient(connection.address, **connection.options) as client:
        tokens = client.render(prompt, truncate_prompt_tokens=namespace.truncate_prompt_tokens, model=namespace.model)
    if namespace.json:
        print(json.dumps(asdict(tokens)), flush=True)
    else:
        print_text("\n".join(lines_of(tokens)))
    return 0


def lines_of(tokens: PromptTokens) -> Iterator[str]:
    """The lines that the command prints."""
    assert tokens.token_texts is not None, "they were asked for"
    special, messages = frozenset(tokens.special_positions), ["-"] * len(tokens.token_ids)
    for index, boundary in enumerate(tokens.message_boundaries):
        for position in range(boundary.start_token, boundary.end_token):
            messages[position] = f"{index} {boundary.role}"
    places = ["-"] * len(messages) if tokens.offsets is None else [f"{start}-{end}" for start, end in tokens.offsets]
    width = max(map(len, messages))
    for position, (token_id, text) in enumerate(zip(tokens.token_ids, tokens.token_texts, strict=True)):
        mark = "*" if position in special else " "
        shown = json.dumps(text, ensure_ascii=False)
        yield f"{position:>6} {token_id:>7} {places[position]:>11}  {messages[position]:<{width}} {mark} {shown}"
