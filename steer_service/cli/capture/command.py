"""`steer capture PROMPTS`: the hidden states of many prompts as a data set, for probes and sparse autoencoders."""

import argparse
import asyncio
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from steer_client import AsyncSteerClient, ModelInfo
from steer_client.channel import ClientOptions
from steer_service.cli.arguments import (
    POSITIONS,
    UsageError,
    add_request_arguments,
    capture_of,
    layers_from,
    print_error,
)
from steer_service.cli.capture.prompts import PromptSource, is_binary, open_prompts
from steer_service.cli.capture.run import CaptureRun, Limits, PromptFailed
from steer_service.cli.capture.shards import CaptureFolder
from steer_service.cli.capture.windows import Cutting
from steer_service.cli.connection import Connection, connection_from
from steer_service.cli.exit_status import FAILED
from steer_service.cli.progress import CaptureProgress, format_count, print_message
from steer_service.cli.run_command import run_command
from steer_service.cli.steering_argument import add_steering_arguments, steering_of
from steer_service.core.capture import CaptureDelivery, CaptureSite, Pooling
from steer_service.core.checks import check_request
from steer_service.core.errors import SteerError
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.formats.capture_dataset import ERRORS, FORMAT, LAYERS, VERSION
from steer_service.runtime.retry import STARTING, RetryPolicy
from steer_service.shm.limits import raise_open_files_limit

DELIVERIES = {
    "auto": CaptureDelivery.SHARED_MEMORY_PREFERRED,
    "inline": CaptureDelivery.INLINE,
    "shared": CaptureDelivery.SHARED_MEMORY_REQUIRED,
}
"""Value of `--delivery` -> the delivery that the server is asked for."""

DESCRIPTION = f"""\
Captures the residual stream of every prompt in PROMPTS and writes it to the folder --out.

PROMPTS is a text file with one prompt per line, or JSON lines; `-` is standard input. A JSON line is a string, or an
object with "text", "token_ids" or "messages" (a chat, through the model's template), and optionally an "id". Empty
lines are skipped.

A text that has its BOS token already has "add_special_tokens": false; --no-special-tokens is for whole files of them. A
chat may have "continue_final_message", "add_generation_prompt", "chat_template_kwargs" and "tools". By default, an
assistant's message at the end is the beginning of a response: the prompt ends with its last character. With
"add_generation_prompt": false the prompt ends with the end of the last message, without a header of the next turn.

{POSITIONS}
The folder contains shards: capture-00000.safetensors and so on. A shard has a tensor `layer_N.after` (or `.before`) of
shape [rows, hidden_size] for each layer, in the captured dtype. Layer N is the residual stream after decoder block N,
counted from 0. The tensors `prompt_index` (from 0), `position`, `token_id`, `is_generated` and `is_steered` describe
each row. With --pooling a prompt has one row, whose labels are those of the last of its positions. A mean is float32.
capture-00000.jsonl has a line for each prompt of that shard. It has the prompt's "id", its first row, its number of
rows, and the other fields of its line in PROMPTS. The line of a chat has its "messages", each with its role and the
positions of its text, from "start" to before "end", or "messages_missing_reason". The first line of manifest.jsonl says
how all was captured; its "special_token_ids" are the tokens of the model that are not text.
`steer_client.load_captures(folder)` reads the folder.

--truncate captures the beginning of texts that are longer than the model takes. Chats are not cut so.

--context N --stride M cuts texts of more than N tokens to windows of N tokens that begin M tokens apart. The first
window captures all of its rows, each further one those of its last M tokens. So every token has one row, with at least
N - M tokens before it, or the whole text before it. If the text begins with a special token, such as BOS, every window
does. Its row is captured once. Each row has its "position" in the whole text, and its "window". The line of the text
has its "windows".

The same command resumes where an earlier run ended, even if that was killed. A prompt that fails gets a line in
errors.jsonl and does not stop the others; the exit status is then 1.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """The options of the command line."""

    prompts: str
    """The file of prompts, or `-`."""
    form: str
    """Its form: auto, text or jsonl."""
    add_special_tokens: bool
    """False: texts get no special tokens, unless their line says that they do."""
    out: Path
    """The folder to fill."""
    connection: Connection
    """The server."""
    shm_dir: str
    """Where this process sees the server's shared memory."""
    positions: str | None
    """Positions to capture, as they were written."""
    request: GenerateRequest
    """The request for each prompt, without the prompt and what only the model's information can complete."""
    limits: Limits
    """Limits on what runs and is held at a time."""
    retry_timeout_s: float
    """Seconds for which a lost server is retried."""
    cutting: Cutting | None
    """What becomes of long texts; None: they fail."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer capture`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("prompts", metavar="PROMPTS", help="the file of prompts")
    parser.add_argument("--layers", metavar="LAYERS", required=True, help="layers to capture, such as 3,7-9")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder to write captures to")
    parser.add_argument("--positions", metavar="POSITIONS", help="positions to capture (default: all)")
    parser.add_argument(
        "--site",
        choices=[site.value for site in CaptureSite],
        default=CaptureSite.AFTER.value,
        help="capture after steering, before it, or both (default: %(default)s)",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, or the model's own (default: the model's)")
    parser.add_argument(
        "--pooling",
        choices=[pooling.value for pooling in Pooling],
        default=Pooling.NONE.value,
        help="one row for each prompt: the mean, the last or the largest values of its rows (default: %(default)s)",
    )
    add_request_arguments(parser, max_tokens=0)
    add_steering_arguments(parser)
    parser.add_argument(
        "--format",
        choices=("auto", "text", "jsonl"),
        default="auto",
        help="format of PROMPTS; auto decides by its name and its first line (default: %(default)s)",
    )
    parser.add_argument(
        "--no-special-tokens", action="store_true", help="for texts that have their BOS token already: add none"
    )
    parser.add_argument(
        "--truncate", action="store_true", help="of texts longer than the model takes, capture the beginning"
    )
    parser.add_argument(
        "--context", metavar="N", type=int, help="cut longer texts to windows of N tokens; each token has one row"
    )
    parser.add_argument(
        "--stride", metavar="M", type=int, help="tokens between the beginnings of two windows (default: half of N)"
    )
    parser.add_argument(
        "--shard-mb", type=float, metavar="N", default=256.0, help="most MiB of a shard (default: %(default)g)"
    )
    parser.add_argument(
        "--shard-seconds",
        type=float,
        metavar="S",
        default=30.0,
        help="seconds after which a shard is written although it is small (default: %(default)g)",
    )
    parser.add_argument(
        "--concurrency", type=int, metavar="N", default=16, help="most requests at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--delivery",
        choices=tuple(DELIVERIES),
        default="auto",
        help="how rows are delivered; auto uses shared memory if the server offers it (default: %(default)s)",
    )
    parser.add_argument(
        "--shm-dir",
        metavar="FOLDER",
        default="/dev/shm",
        help="where the server's shared memory is mounted (default: %(default)s)",
    )
    parser.add_argument(
        "--retry-timeout",
        type=float,
        metavar="S",
        default=120.0,
        help="seconds for which a lost server is retried (default: %(default)g)",
    )
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first prompt that fails")


def run(namespace: argparse.Namespace) -> int:
    """Executes the command line and returns the exit status."""
    return run_command(partial(options_from, namespace), _execute)


def _execute(options: CaptureOptions) -> int:
    if Path(options.prompts).is_file() and is_binary(Path(options.prompts)):
        raise UsageError(f"PROMPTS: {options.prompts} is not a text file in UTF-8")
    raise_open_files_limit()  # the rows of every prompt in flight may be mapped at a time
    try:
        with open_prompts(options.prompts, options.form, add_special_tokens=options.add_special_tokens) as source:
            return asyncio.run(_capture(options, source))
    except PromptFailed as error:
        return print_error(f"steer: {error}", FAILED)


def options_from(namespace: argparse.Namespace) -> CaptureOptions:
    """What the command line describes; raises UsageError or InvalidRequest."""
    if namespace.prompts != "-" and (not Path(namespace.prompts).exists() or Path(namespace.prompts).is_dir()):
        raise UsageError(f"PROMPTS: {namespace.prompts} is not a file")
    for option in ("shard_mb", "shard_seconds", "concurrency", "retry_timeout"):
        if not 0 < getattr(namespace, option) < math.inf:
            raise UsageError(f"--{option.replace('_', '-')}: {getattr(namespace, option)} is not above 0")
    connection = connection_from(namespace)
    request = _request_from(namespace, connection)
    return CaptureOptions(
        prompts=namespace.prompts,
        form=namespace.format,
        add_special_tokens=not namespace.no_special_tokens,
        out=namespace.out,
        connection=connection,
        shm_dir=namespace.shm_dir,
        positions=namespace.positions,
        request=request,
        limits=Limits(
            concurrency=namespace.concurrency,
            shard_bytes=int(namespace.shard_mb * 2**20),
            shard_seconds=namespace.shard_seconds,
            fail_fast=namespace.fail_fast,
        ),
        retry_timeout_s=namespace.retry_timeout,
        cutting=_cutting_from(namespace, request),
    )


def _cutting_from(namespace: argparse.Namespace, request: GenerateRequest) -> Cutting | None:
    """What becomes of long texts; raises UsageError."""
    context, stride = namespace.context, namespace.stride
    if stride is not None and context is None:
        raise UsageError("--stride needs --context")
    if not namespace.truncate and context is None:
        return None
    option = "--truncate" if namespace.truncate else "--context"
    if namespace.truncate and context is not None:
        raise UsageError("--truncate and --context: choose one of them")
    if namespace.truncate_prompt_tokens is not None:
        raise UsageError(f"{option} and --truncate-prompt-tokens: choose one of them")
    if namespace.max_tokens:
        raise UsageError(f"{option} is for prompts alone: it needs --max-tokens 0")
    if namespace.truncate:
        return Cutting()
    if context < 2:
        raise UsageError(f"--context: {context} is not at least 2")
    stride = context // 2 if stride is None else stride
    if not 1 <= stride < context:
        raise UsageError(f"--stride: {stride} is outside 1..{context - 1}, below --context")
    if namespace.pooling != Pooling.NONE.value:
        raise UsageError("--context: the rows of several windows are not pooled; leave out --pooling")
    if request.steering is not None and any(request.steering.numbered_scopes().paths.values()):
        raise UsageError("--context: steering with positions is for whole prompts; steer all positions")
    return Cutting(context=context, stride=stride)


def _request_from(namespace: argparse.Namespace, connection: Connection) -> GenerateRequest:
    capture = capture_of(
        layers_from("--layers", namespace.layers, connection),
        "--positions",
        namespace.positions,
        site=namespace.site,
        dtype=namespace.dtype,
        pooling=namespace.pooling,
    )
    steering = steering_of(namespace)
    steered = steering.positions if steering is not None else None
    for option, scope in (("--positions", capture.positions), ("--steer-positions", steered)):
        if scope is not None and scope.is_generated_only and namespace.max_tokens < 2:
            raise UsageError(f"{option}: the last token is never fed to the model; generated needs --max-tokens 2")
    return GenerateRequest(
        prompt=TokenPrompt(token_ids=(0,)),
        model=namespace.model,
        truncate_prompt_tokens=namespace.truncate_prompt_tokens,
        sampling=SamplingOptions(
            max_tokens=namespace.max_tokens, temperature=namespace.temperature, seed=namespace.seed
        ),
        steering=steering,
        capture=replace(capture, delivery=DELIVERIES[namespace.delivery]),
        priority=namespace.priority,
    )


async def _capture(options: CaptureOptions, source: PromptSource) -> int:
    connecting = RetryPolicy(options.retry_timeout_s, print_message, STARTING)
    connection = options.connection
    client_options: ClientOptions = {**connection.options, "shm_dir": options.shm_dir}
    async with await connecting.repeat(
        lambda: AsyncSteerClient.connect(connection.address, **client_options)
    ) as client:
        model = client.info
        request = _request_for(model, options.request)
        if options.cutting is not None and options.cutting.context > model.max_prompt_tokens:
            raise UsageError(
                f"--context: {options.cutting.context} is above the longest prompt, {model.max_prompt_tokens} tokens"
            )
        manifest = _manifest_head(model, request, options)
        with CaptureFolder(options.out, manifest) as folder:
            try:
                with CaptureProgress(total=source.total, done=folder.next_prompt) as progress:
                    capture = CaptureRun(
                        client,
                        model,
                        request,
                        folder,
                        options.limits,
                        progress,
                        options.retry_timeout_s,
                        manifest,
                        options.cutting,
                    )
                    await capture.run(source)
            except (asyncio.CancelledError, SteerError, PromptFailed, OSError):
                covered = format_count(folder.next_prompt, "prompt")
                print_message(f"stopped; {options.out} covers {covered}, the same command resumes there")
                raise
            return _report(options.out, folder, capture)


def _request_for(model: ModelInfo, request: GenerateRequest) -> GenerateRequest:
    """The request completed for this model; raises the SteerError that every prompt would meet."""
    assert request.capture is not None
    capture = replace(request.capture, dtype=request.capture.dtype or model.dtype)
    request = replace(request, capture=capture, model=request.model or model.name)
    check_request(request, model)
    return request


def _manifest_head(model: ModelInfo, request: GenerateRequest, options: CaptureOptions) -> dict[str, Any]:
    """The first line of the manifest. Runs with the same line write parts of the same data set."""
    capture, sampling, cutting = request.capture, request.sampling, options.cutting
    assert capture is not None
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model.name,
        "adapter": request.model if request.model != model.name else None,
        "architecture": model.architecture,
        "layer_count": model.layer_count,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "special_token_ids": list(model.special_token_ids),
        "layers": list(capture.layers),
        "layer_convention": LAYERS,
        "site": capture.site.value,
        "dtype": capture.pooling.dtype_of(capture.dtype),
        "pooling": None if capture.pooling is Pooling.NONE else capture.pooling.value,
        "positions": options.positions,
        "add_special_tokens": options.add_special_tokens,
        "truncate_prompt_tokens": request.truncate_prompt_tokens,
        "truncate": True if cutting is not None and not cutting.context else None,
        "context": cutting.context or None if cutting is not None else None,
        "stride": cutting.stride or None if cutting is not None else None,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "steering_digest": request.steering.digest() if request.steering is not None else None,
    }


def _report(out: Path, folder: CaptureFolder, capture: CaptureRun) -> int:
    how = f", {' and '.join(sorted(capture.deliveries))}" if capture.deliveries else ""
    captured = format_count(capture.covered - capture.failed, "prompt")
    print_message(f"{captured} in {format_count(folder.shards, 'shard')} in {out}{how}")
    if not capture.failed:
        return 0
    return print_error(
        f"steer: {format_count(capture.failed, 'prompt')} failed; {out / ERRORS} has the reasons", FAILED
    )
