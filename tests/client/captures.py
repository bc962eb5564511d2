"""Captures that the tests ask for, and looks at the memory in which they lie."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureHandle, CaptureSite, CaptureSpec
from steer_service.testing.fake_backend import FAKE_MODEL

HELD = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, delivery=CaptureDelivery.HELD)
PROMPT = "a b c"
WIDE = replace(FAKE_MODEL, hidden_size=1 << 16)
LONG = "w " * 40
"""Forty rows of 256 KiB at two layers and both sites: 40 MiB."""


async def rows_of(client: AsyncSteerClient, capture: CaptureSpec, **options: Any) -> Any:
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=capture, **options)
    async with handle:
        return await handle.fetch()


def same(left: Any, right: Any) -> bool:
    """Are the captures equal, bit by bit?"""
    return left.keys() == right.keys() and all(
        mine.keys() == theirs.keys()
        and mine["meta"] == theirs["meta"]
        and all(
            (mine[name].dtype, mine[name].shape, mine[name].tobytes())
            == (theirs[name].dtype, theirs[name].shape, theirs[name].tobytes())
            for name in mine.keys() - {"meta"}
        )
        for layer in left
        for mine, theirs in zip(left[layer], right[layer], strict=True)
    )


SHARED = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED)
PREFERRED = replace(SHARED, delivery=CaptureDelivery.SHARED_MEMORY_PREFERRED)
INLINE = replace(SHARED, delivery=CaptureDelivery.INLINE)


async def captured(client: AsyncSteerClient, capture: CaptureSpec = SHARED, **options: Any) -> CaptureHandle:
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=capture, **options)
    return handle


def memory_of(array: np.ndarray) -> Any:
    """What holds the bytes of an array in the end."""
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def open_segments() -> int:
    links = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(name.startswith("steerllm-") for name in links)


def mapped_segments() -> int:
    return Path("/proc/self/maps").read_text().count("/steerllm-")
