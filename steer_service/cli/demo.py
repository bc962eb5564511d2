"""`steer demo`: finds a direction, then steers, caps and ablates with it in one batch, through a real server."""

import argparse
import asyncio
import json
import shutil
import textwrap
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from steer_client import AsyncSteerClient
from steer_service.cli.progress import print_message, token_bar
from steer_service.cli.run_command import run_command
from steer_service.cli.server_process import ServerProcess
from steer_service.core.errors import EngineFailed
from steer_service.core.events import Event, Receipt, TokenDelta
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.calls import checked_events
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.results import Output, collect

SEA = (
    "The waves rolled over the beach and the sea was full of fish.",
    "Sailors love the ocean, the salt water and the tide.",
    "The ship sailed across the deep blue sea toward the island.",
    "Dolphins and whales swim in the ocean beneath the waves.",
    "We walked along the shore and watched the surf and the gulls.",
    "The coral reef under the sea is full of colourful fish.",
)
"""Texts about the sea."""
LAND = (
    "The meeting started late and the report was full of numbers.",
    "Students like the library, the quiet rooms and the books.",
    "The bus drove across the big grey city toward the station.",
    "Dogs and horses run in the field behind the farm.",
    "We walked along the road and watched the cars and the lights.",
    "The old cupboard in the kitchen is full of white plates.",
)
"""Texts of the same shape about anything else."""

PROMPT = "My favourite thing in the world is"
MAX_TOKENS = 32

STEERED_LAYER = 12
CAPTURED_LAYERS = (STEERED_LAYER, 16)

CACHE_BYTES = 256 << 20
"""Memory for keys and values: about 11,000 tokens on any machine."""

SERVER_FLAGS = ("--kv-cache-memory-bytes", str(CACHE_BYTES), "--max-model-len", "1024", "--enforce-eager")
"""One short batch does not repay a compilation."""

FloatRows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """The shape of the captures of the first step."""

    layers: tuple[int, ...]
    """Layers captured, 0-based."""
    rows: int
    """Rows at each layer, all prompts together."""
    width: int
    """The hidden size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """Everything that the demo prints."""

    captured: Captured
    """Shape of the rows that the direction was made from."""
    outputs: dict[str, Output]
    """`unsteered`, `steered`, `capped` and `ablated`, in this order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer demo`."""
    parser.description = (
        "Starts a server on the bundled model and captures hidden states of texts about the sea and of others. Makes a "
        "direction from the difference, then generates from one prompt unsteered, steered, capped and ablated in one "
        "batch."
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(namespace: argparse.Namespace) -> int:
    """Runs the demo and returns the exit status."""
    return run_command(lambda: namespace, _execute)


def _execute(namespace: argparse.Namespace) -> int:
    shown = asyncio.run(_serve_and_demonstrate(_model_flags()))
    print(json.dumps(as_json(shown)) if namespace.json else as_text(shown, shutil.get_terminal_size((120, 24)).columns))
    return 0


def _model_flags() -> tuple[str, ...]:
    from steer_service.hf.bundled_model import NAME, ensure_bundled_model

    folder = ensure_bundled_model()  # here and not in the server, whose output is not shown
    return (str(folder), "--served-model-name", NAME)


async def _serve_and_demonstrate(model_flags: tuple[str, ...]) -> Demonstration:
    async with ServerProcess((*model_flags, *SERVER_FLAGS)) as server:
        await server.wait_until_serving()
        async with await AsyncSteerClient.connect(server.address) as client:
            shown = await demonstrate(client)
        await server.stop()
    return shown


async def demonstrate(client: AsyncSteerClient) -> Demonstration:
    """Captures, makes the direction and generates the batch of four; raises a SteerError."""
    print_message(f"capturing layers {CAPTURED_LAYERS} for {len(SEA) + len(LAND)} short texts")
    sea, land = await _capture(client, SEA), await _capture(client, LAND)
    print_message(f"making a direction at layer {STEERED_LAYER}: mean over the sea texts - mean over the others")
    specs = steering_specs(sea[STEERED_LAYER], land[STEERED_LAYER])
    print_message(f"generating {len(specs)} outputs for {PROMPT!r} in one batch")
    outputs = await _generate_batch(client, specs)
    return Demonstration(captured=_shapes(sea, land), outputs=outputs)


def steering_specs(sea: list[FloatRows], land: list[FloatRows]) -> dict[str, SteeringSpec | None]:
    """The four kinds of steering, made from the rows of one layer of every text, each of shape [rows, hidden_size]."""
    direction = _mean(sea) - _mean(land)
    unit = direction / np.linalg.norm(direction)
    level = float(_mean(sea) @ unit)
    return {
        "unsteered": None,
        "steered": SteeringSpec.simple_add(STEERED_LAYER, direction),
        "capped": SteeringSpec.simple_cap(STEERED_LAYER, direction, min=level),
        "ablated": SteeringSpec.simple_ablation(STEERED_LAYER, direction),
    }


def _mean(texts: list[FloatRows]) -> FloatRows:
    # The first row of every text is an attention sink: many times longer than the others, and the same for all.
    return np.mean([rows[1:].mean(axis=0) for rows in texts], axis=0)


async def _capture(client: AsyncSteerClient, texts: tuple[str, ...]) -> dict[int, list[FloatRows]]:
    """Layer -> for each text its rows, shape [rows, hidden_size]."""
    _, handles = await client.generate(texts, max_tokens=1, temperature=0.0, capture_layers=CAPTURED_LAYERS)
    assert handles is not None, "captures were requested"
    fetched = [await _fetch(handle) for handle in handles]
    return {layer: [rows[layer] for rows in fetched] for layer in CAPTURED_LAYERS}


async def _fetch(handle: CaptureHandle) -> dict[int, FloatRows]:
    async with handle:
        captures = await handle.fetch()
        return {layer: captures[layer][0]["hidden"] for layer in handle.layer_indices}


def _shapes(*groups: dict[int, list[FloatRows]]) -> Captured:
    texts = [rows for group in groups for rows in group[STEERED_LAYER]]
    return Captured(layers=CAPTURED_LAYERS, rows=sum(map(len, texts)), width=texts[0].shape[1])


async def _generate_batch(client: AsyncSteerClient, specs: dict[str, SteeringSpec | None]) -> dict[str, Output]:
    with token_bar(len(specs) * MAX_TOKENS) as bar:
        generations = await asyncio.gather(*(collect(_counted(client, spec, bar)) for spec in specs.values()))
    outputs = {name: generation.outputs[0] for name, generation in zip(specs, generations, strict=True)}
    for name, spec in specs.items():
        _check_receipt(name, spec, outputs[name].receipt)
    return outputs


async def _counted(client: AsyncSteerClient, spec: SteeringSpec | None, bar: tqdm) -> AsyncGenerator[Event, None]:
    request = GenerateRequest(
        prompt=TextPrompt(text=PROMPT),
        sampling=SamplingOptions(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True),
        steering=spec,
    )
    async with aclosing(checked_events(client, request)) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                bar.update(len(event.token_ids))
            yield event


def _check_receipt(name: str, spec: SteeringSpec | None, receipt: Receipt) -> None:
    expected = "" if spec is None else spec.digest()
    if receipt.steering_digest != expected:
        raise EngineFailed(f"the receipt of the {name} output does not name the steering that was sent")


def as_json(shown: Demonstration) -> dict[str, Any]:
    """The demo as one JSON object."""
    outputs: dict[str, Any] = {
        name: {"text": output.text, "receipt": asdict(output.receipt)} for name, output in shown.outputs.items()
    }
    return {**outputs, "captured": asdict(shown.captured)}


def as_text(shown: Demonstration, width: int) -> str:
    """The demo for a terminal `width` characters wide: the four outputs side by side, receipts under them."""
    gap = "  "
    column = max(18, (width - 3 * len(gap)) // 4)
    texts = [textwrap.wrap(output.text.strip(), column) for output in shown.outputs.values()]
    receipts = [_receipt_lines(output.receipt) for output in shown.outputs.values()]
    rows = [
        [name.upper() for name in shown.outputs],
        ["-" * column] * len(texts),
        *_rows(texts),
        ["-" * column] * len(texts),
        *_rows(receipts),
    ]
    captured = shown.captured
    shapes = ", ".join(f"layer {layer} [{captured.rows}, {captured.width}]" for layer in captured.layers)
    lines = [gap.join(cell.ljust(column) for cell in row).rstrip() for row in rows]
    return "\n".join([f"Captured: {shapes}", f"Prompt:   {PROMPT}", "", *lines])


def _rows(columns: list[list[str]]) -> list[list[str]]:
    height = max(map(len, columns))
    return [[column[row] if row < len(column) else "" for column in columns] for row in range(height)]


def _receipt_lines(receipt: Receipt) -> list[str]:
    layers = ", ".join(map(str, receipt.steered_layers)) or "none"
    return [
        f"digest {receipt.steering_digest[:10] or 'none'}",
        f"layers {layers}",
        f"steered {receipt.rows_steered}/{receipt.rows_total}",
        f"from cache {receipt.rows_from_prefix_cache}",
    ]
