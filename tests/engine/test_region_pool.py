"""Regions: captures, whoever takes them and however many, leave room for the marks of steered requests."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CapturedRows, CaptureSpec, Pooling
from steer_service.core.errors import OverBudget
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine import region_pool
from steer_service.engine.mark_memory import MarkMemory
from steer_service.engine.output_rows import RegionRows
from steer_service.engine.region_pool import RegionPool
from steer_service.ops.program import compile_program
from steer_service.runtime.local_capture import metadata_of
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory
from tests.shm.private_mounts import on_tmpfs

INFO = ModelInfo(
    name="model",
    architecture="LlamaForCausalLM",
    layer_count=4,
    hidden_size=64,
    vocab_size=1000,
    max_model_len=4096,
    dtype="float32",
    max_programs=8,
    max_operations=64,
    max_operations_per_layer=8,
)
LIMIT_S = 20
STEERING = SteeringSpec.simple_add(1, np.ones(64), 2.0)
PROGRAM = compile_program(STEERING)


async def no_fence() -> None:
    """The workers have nothing to do."""


def pool(folder: Path, budget: int, marks: int = 64 << 10) -> RegionPool:
    directory = SegmentDirectory(path=folder)
    memory = MarkMemory(directory.create(marks), no_fence)
    memory.segment.unlink()  # as after the handshake
    return RegionPool(SegmentPool(budget, directory), memory, INFO, stages=1)


async def prepared(
    client_id: str, *, rows: int = 1000, captures: bool = False, n: int = 1, **capture: str
) -> PreparedRequest:
    async def render(_: GenerateRequest) -> RenderedPrompt:
        return RenderedPrompt(token_ids=(1, 2))

    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=(1, 2)),
        sampling=SamplingOptions(max_tokens=rows - 1, n=n),
        steering=STEERING,
        capture=CaptureSpec(layers=(0, 1), **capture) if captures else None,
        client_id=client_id,
    )
    return await prepare(request, INFO, render)


async def fill(regions: RegionPool, stack: AsyncExitStack) -> None:
    """Captures until nothing more fits, down to the smallest capture."""
    rows = 1000
    while rows > 1:
        try:
            await stack.enter_async_context(regions.reserve(await prepared("a", rows=rows, captures=True), PROGRAM))
        except OverBudget:
            rows //= 2


async def steered(regions: RegionPool, stack: AsyncExitStack, client_id: str = "b") -> RegionRows:
    return await stack.enter_async_context(regions.reserve(await prepared(client_id), PROGRAM))


async def test_a_client_that_fills_the_capture_memory_does_not_stop_steering(tmp_path: Path) -> None:
    regions = pool(tmp_path, budget=2 << 20)
    async with AsyncExitStack() as stack:
        await fill(regions, stack)
        with pytest.raises(OverBudget):
            await stack.enter_async_context(regions.reserve(await prepared("b", captures=True), PROGRAM))

        rows = await steered(regions, stack)

        assert rows.bytes_reserved == 1024
        assert not rows.is_steered(1000).any()


async def test_a_client_with_its_share_of_marks_uses_capture_memory_for_more(tmp_path: Path) -> None:
    regions = pool(tmp_path, budget=1 << 20, marks=16 << 10)
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await steered(regions, stack, "a")
        assert regions.segments.reserved_bytes == 0
        await steered(regions, stack, "a")
        assert regions.segments.client_bytes("a") == 1024

        await steered(regions, stack, "b")
        assert regions.segments.client_bytes("b") == 0
    assert (regions.segments.reserved_bytes, regions.marks.used_bytes) == (0, 0)


async def test_outputs_that_never_fit_together_are_refused_before_the_first_is_reserved(tmp_path: Path) -> None:
    regions = pool(tmp_path, budget=1 << 20)
    regions.check(await prepared("a", captures=True))
    regions.check(await prepared("a", n=8))

    with pytest.raises(OverBudget) as raised:
        regions.check(await prepared("a", captures=True, n=3))

    assert raised.value.retry_after_s is None


async def test_memory_that_is_made_for_a_request_that_was_cancelled_meanwhile_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_pool, "LARGE_SEGMENT", 0)  # every segment is made in a thread
    regions = pool(tmp_path, budget=1 << 20)
    async with AsyncExitStack() as stack:
        reserving = asyncio.ensure_future(
            stack.enter_async_context(regions.reserve(await prepared("a", captures=True), PROGRAM))
        )
        while not regions.segments.reserved_bytes and not reserving.done():
            await asyncio.sleep(0)
        reserving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reserving

        async with asyncio.timeout(LIMIT_S):
            while regions.segments.reserved_bytes:
                await asyncio.sleep(0)


async def test_stored_pooled_rows_have_a_small_segment_that_stays_alone(tmp_path: Path) -> None:
    regions = pool(tmp_path, 10 << 20)
    request = await prepared("a", captures=True, pooling="mean", delivery="held")
    rows = {layer: np.full((1, 64), layer, np.float32) for layer in (0, 1)}
    pooled = CapturedRows(after=rows, spans=((0, 2),), pooling=Pooling.MEAN)
    metadata = metadata_of(pooled, (0, 1), 2, 2)

    async with regions.reserve(request, None) as output:
        reserved = regions.segments.reserved_bytes
        held = output.store(metadata, pooled)
        assert output.bytes_reserved == reserved

    left = regions.segments.reserved_bytes
    assert 2 * 64 * 4 <= left < 2048 < 2 * 1000 * 64 * 4 < reserved
    assert held.captured == pooled
    assert held.segment is not None
    held.release_nowait()
    assert regions.segments.reserved_bytes == 0


@pytest.mark.parametrize("delivery", ["inline", "held"])
async def test_pooled_rows_that_nobody_stores_leave_nothing(tmp_path: Path, delivery: str) -> None:
    regions = pool(tmp_path, 10 << 20)
    async with regions.reserve(await prepared("a", captures=True, pooling="mean", delivery=delivery), None):
        assert regions.segments.reserved_bytes > 0
    assert regions.segments.reserved_bytes == 0


async def test_a_budget_without_room_for_the_pooled_rows_too_is_refused_first(tmp_path: Path) -> None:
    request = await prepared("a", captures=True, pooling="mean", delivery="held")
    plain = await prepared("a", captures=True, delivery="held")
    size = pool(tmp_path, 10 << 20)._layout_of(plain).size

    regions = pool(tmp_path, size)
    regions.check(plain)
    with pytest.raises(OverBudget):
        regions.check(request)
    with pytest.raises(OverBudget):
        async with regions.reserve(request, None):
            pass
    assert regions.segments.reserved_bytes == 0


def test_a_full_file_system_does_not_stop_steering(tmp_path: Path) -> None:
    script = """
import asyncio, json, sys
from contextlib import AsyncExitStack
from pathlib import Path
from steer_service.core.errors import Overloaded
from tests.engine.test_region_pool import fill, pool, prepared, steered, PROGRAM

async def run(folder):
    regions = pool(folder, budget=64 << 20)
    async with AsyncExitStack() as stack:
        await fill(regions, stack)
        others = folder / "others"
        try:
            with others.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError as error:
            full = str(error)
        rows = [await steered(regions, stack) for _ in range(5)]
        for one in rows:
            one.region.marks_ST[:] = 1
        return {"full": full, "rows": [int(one.is_steered(1000).sum()) for one in rows]}

print(json.dumps(asyncio.run(run(Path(sys.argv[1])))))
"""
    answer = on_tmpfs("size=1m", tmp_path, script)

    assert "No space left on device" in answer["full"]
    assert answer["rows"] == [1000] * 5
