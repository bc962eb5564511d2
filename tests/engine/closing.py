"""What must hold when an engine is closed, whatever it is doing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.events import TokenDelta
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine import VLLMSteeringModel


@contextmanager
def leaves_nothing() -> Iterator[None]:
    """Processes that the block started have ended after it, and /dev/shm has no file of them."""
    files, children = _files(), _children()
    yield
    assert [child for child in _children() - children if not _is_tracker(child)] == []
    assert _files() - files == set()


def mapped() -> set[str]:
    """Segments of this project and hearts of vLLM's processes that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return {line.split()[5] for line in maps if "/steerllm-" in line or "memfd:steer-heart" in line}


async def close_in_the_middle_of_a_captured_request(model: VLLMSteeringModel) -> None:
    """The steered request fails, a later one is refused, and closing twice is the same as closing once."""
    request = GenerateRequest(
        prompt=TextPrompt(text="Once upon a time"),
        sampling=SamplingOptions(max_tokens=400, temperature=0.0, ignore_eos=True),
        steering=SteeringSpec.simple_add(1, np.ones(model.info.hidden_size), 4.0),
        capture=CaptureSpec(layers=(0, 1)),
    )
    events = model.submit(request)
    async for event in events:
        if isinstance(event, TokenDelta):
            break
    await model.close()
    await model.close()
    with pytest.raises(SteerError):
        await anext(events)
    with pytest.raises(EngineFailed, match="closed"):
        await anext(model.submit(request))


def _files() -> set[str]:
    """What is in /dev/shm, without lock files: the one of this process lives as long as the interpreter."""
    return {name for name in os.listdir("/dev/shm") if not name.endswith(".lock")}


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _is_tracker(process: psutil.Process) -> bool:
    """Python's own resource tracker, which lives as long as the interpreter."""
    return any("resource_tracker" in part for part in process.cmdline())
