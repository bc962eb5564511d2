"""`steer info`: the model, the limits and the version of a running server."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from steer_client import ModelInfo, ServerInfo, SteerClient
from steer_client.channel import ClientOptions
from steer_service.cli.connection import add_connection_arguments, connection_from
from steer_service.cli.exit_status import FAILED
from steer_service.cli.run_command import run_command
from steer_service.cli.terminal import print_text
from steer_service.core.errors import SteerError

DESCRIPTION = """\
Shows the model of a running server, the limits of requests, and the server's version and name.

While the model loads, there is only the server's part, and the exit status is 1. --json prints one object: "server",
"model" (null while it loads) and "model_missing_reason".
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer info`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_connection_arguments(parser)
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=10.0, help="seconds to wait (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(namespace: argparse.Namespace) -> int:
    """Executes the command line and returns the exit status."""
    return run_command(partial(_client_from, namespace), partial(_execute, namespace))


def _client_from(namespace: argparse.Namespace) -> SteerClient:
    connection = connection_from(namespace)
    options: ClientOptions = {**connection.options, "unary_timeout_s": namespace.timeout}
    try:
        return SteerClient(connection.address, **options)
    except SteerError as error:
        error.field = error.field.replace("unary_timeout_s", "--timeout")
        raise


def _execute(namespace: argparse.Namespace, client: SteerClient) -> int:
    model, reason = None, ""
    with client:
        server = client.server_info()
        try:
            model = client.info
        except SteerError as error:
            reason = str(error)
    if namespace.json:
        found = {
            "server": {**asdict(server), "features": sorted(server.features)},
            "model": asdict(model) if model is not None else None,
            "model_missing_reason": reason,
        }
        print(json.dumps(found), flush=True)
    else:
        print_text("\n".join(lines_of(server, model, reason)))
    return 0 if model is not None else FAILED


def lines_of(server: ServerInfo, model: ModelInfo | None, reason: str) -> Iterator[str]:
    """The lines that the command prints. `reason`: why there is no model."""
    rows = _model_rows(model) if model is not None else [("model", reason)]
    rows += _server_rows(server)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"{name:<{width}}  {value}"


def _model_rows(model: ModelInfo) -> list[tuple[str, str]]:
    return [
        ("model", " ".join((model.name, *(f"(also {alias})" for alias in model.aliases)))),
        ("architecture", model.architecture),
        ("adapters", ", ".join(model.adapters) or "none"),
        ("layers", f"{model.layer_count} (0..{model.layer_count - 1})"),
        ("hidden size", str(model.hidden_size)),
        ("dtype", model.dtype),
        ("vocabulary", f"{model.vocab_size} tokens"),
        ("special tokens", ", ".join(map(str, model.special_token_ids)) or "none known"),
        ("chat template", "yes" if model.has_chat_template else "no"),
        ("longest sequence", f"{model.max_model_len} tokens of prompt and output"),
        ("longest prompt", f"{model.max_prompt_tokens} tokens, if none is generated (--max-tokens 0)"),
        ("steering", f"{model.max_programs} programs in use at once, {model.max_operations} operations of one"),
        ("", f"{model.max_operations_per_layer} operations at one layer"),
        ("log-probabilities", f"of {model.max_logprobs} tokens at most"),
    ]


def _server_rows(server: ServerInfo) -> list[tuple[str, str]]:
    limits = server.limits
    return [
        ("server", f"steerllm {server.version}, contract revision {server.api_revision}"),
        ("instance", f"{server.instance} (run {server.instance_id})"),
        ("requests", f"{limits.max_concurrent_requests} at once, {limits.max_message_bytes} bytes of one"),
        ("outputs", f"{limits.max_outputs} of one request"),
        ("stored vectors", f"{limits.max_vector_bytes} bytes of one client"),
        ("features", ", ".join(sorted(server.features))),
        ("proof at start", str(server.start_proof) if server.start_proof is not None else "none"),
    ]
