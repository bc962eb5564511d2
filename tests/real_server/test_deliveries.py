"""The same rows, whichever way they come, and nothing left afterwards."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_client import AsyncSteerClient, SteerClient
from steer_service.core.capture import CapturedRows, CaptureSite, CaptureSpec
from steer_service.core.errors import NotFound
from steer_service.core.events import TokenDelta
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.handle import CaptureHandle
from tests.real_server.serving import Server, ask, run, segments_here

pytestmark = [pytest.mark.engine, pytest.mark.slow]


class TestDeliveries:
    """The same rows, whichever way they come."""

    CAPTURE = CaptureSpec(layers=(29, 3), site=CaptureSite.BOTH)
    SPEC = SteeringSpec.simple_add(29, np.random.default_rng(1).normal(size=576), 1.0)

    async def rows_of(self, client: AsyncSteerClient, **changes: object) -> tuple[CapturedRows, CaptureHandle]:
        capture = replace(self.CAPTURE, **changes)
        options = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, "steering_spec": self.SPEC}
        _, handles = await client.generate(["The harbour lies"], capture=capture, **options)
        return await handles[0].fetch_rows(), handles[0]

    async def test_every_delivery_brings_the_same_rows(self, client: AsyncSteerClient) -> None:
        inline, _ = await self.rows_of(client)
        for changes in ({"is_live": True}, {"delivery": "held"}, {"delivery": "shared_memory_required"}):
            rows, handle = await self.rows_of(client, **changes)
            assert rows == inline, changes
            assert rows.labels is not None
            await handle.close()
        assert segments_here() == []

    async def test_a_held_capture_is_fetched_in_parts_and_is_gone_when_closed(self, client: AsyncSteerClient) -> None:
        whole, handle = await self.rows_of(client, delivery="held")
        async with handle:
            part = await handle.fetch_rows(layers=[29], positions=["generated", -1])
            assert part == whole.select([29], part.spans)
            assert len(part.labels) == 6
        with pytest.raises(NotFound):
            await handle.fetch_rows()

    async def test_shared_rows_are_mapped_and_stay_when_the_lease_is_gone(self, client: AsyncSteerClient) -> None:
        _, handle = await self.rows_of(client, delivery="shared_memory_preferred")
        captures = await handle.fetch(framework="torch")
        assert len(segments_here()) == 1
        before = captures[3][0]["hidden"].clone()
        await handle.close()
        assert segments_here() == []
        assert captures[3][0]["hidden"].dtype == torch.bfloat16
        assert torch.equal(captures[3][0]["hidden"], before)

    async def test_closing_a_client_releases_its_leases(self, server: Server) -> None:
        async with AsyncSteerClient(server.address) as leaving:
            rows, handle = await self.rows_of(leaving, delivery="shared_memory_required")
            assert len(segments_here()) == 1
        for _ in range(100):
            if not segments_here():
                break
            await asyncio.sleep(0.05)
        assert segments_here() == []
        assert np.isfinite(rows.after[3].astype(np.float32)).all()
        await handle.close()

    def test_the_sync_client_fetches_several(self, server: Server) -> None:
        seen: list[tuple[int, int]] = []
        with SteerClient(server.address) as client:
            _, handles = client.generate(["One", "Two"], max_tokens=3, capture=replace(self.CAPTURE, delivery="held"))
            captures = client.fetch_all(handles, progress=lambda here, all_: seen.append((here, all_)))
            total = sum(handle.total_bytes for handle in handles)
            for handle in handles:
                handle.close()
        assert [captured[3][0]["after"].shape[1] for captured in captures] == [576, 576]
        assert seen[-1] == (total, total)


async def test_closing_the_iterator_frees_the_engine(server: Server, client: AsyncSteerClient) -> None:
    spec = SteeringSpec.simple_add(3, np.ones(576))
    for _ in range(5):
        request = ask("Tell me", steering=spec, capture=CaptureSpec(layers=(3,)), sampling={"max_tokens": 400})
        async with aclosing(client.submit(request)) as events:
            async for event in events:
                if isinstance(event, TokenDelta):
                    break
    await run(client, ask("Still here"))
    assert segments_here() == []
