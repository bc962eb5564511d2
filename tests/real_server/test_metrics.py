"""The HTTP port of a real server: vLLM's series as routers and autoscalers of inference servers read them."""

import asyncio
import re

import numpy as np
import pytest

from steer_client import AsyncSteerClient
from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.specs import SteeringSpec
from tests.deploy.queries import alerts, dashboard_queries, labels_on, needs_of
from tests.real_server.serving import Server, ask, run
from tests.server.scraped import documented, get, series

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OF_ROUTERS = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
}
"""Series that endpoint pickers and autoscalers need by these names."""

TOKENS = 160
"""Of a request that runs while its series are read: over a second."""


async def test_vllms_series_and_ours_are_on_one_page(server: Server, client: AsyncSteerClient) -> None:
    before = await series(server.metrics_port)
    await client.generate("The sea is", max_tokens=7, ignore_eos=True)
    after = await series(server.metrics_port)

    assert {name for name, _ in after} >= OF_ROUTERS
    generated = [
        sum(value for (name, _), value in found.items() if name == "vllm:generation_tokens_total")
        for found in (before, after)
    ]
    assert generated[1] == generated[0] + 7
    assert after["steerllm_time_to_first_token_seconds_count", ()] > 0
    assert after["steerllm_start_proof_seconds", ()] > 0
    assert await get(server.metrics_port, "/ready") == (200, "ok\n")


async def test_every_series_of_the_dashboard_the_alerts_and_the_documentation_exists(
    server: Server, client: AsyncSteerClient
) -> None:
    await run(client, ask("The sea is"))
    _, page = await get(server.metrics_port, "/metrics")
    there = labels_on(page)
    of_tls = "steerllm_certificate_expiry_timestamp_seconds"  # this server has no certificate
    whole = {re.sub("_(bucket|count|sum)$", "", name) for name in there}
    assert documented() - {of_tls} <= whole
    needs = [
        need for need in needs_of([*dashboard_queries(), *(rule["expr"] for rule in alerts())]) if need.name != of_tls
    ]
    assert len([need for need in needs if need.name.startswith("vllm:")]) > 8
    assert [need for need in needs if not need.is_met(there)] == []


async def test_the_bank_the_memory_and_what_is_held_are_those_of_the_engine(
    server: Server, client: AsyncSteerClient
) -> None:
    before = await series(server.metrics_port)
    steering = SteeringSpec.simple_add(3, np.full(576, 0.015625, np.float32))
    capture = CaptureSpec(layers=(3,), delivery=CaptureDelivery.HELD)
    request = ask("The sea is", steering=steering, capture=capture, sampling={"max_tokens": TOKENS})
    running = asyncio.ensure_future(run(client, request))
    slots, used = ("steerllm_bank_slots", ("used",)), ("steerllm_shared_memory_used_bytes", ("captures",))
    while not ((during := await series(server.metrics_port))[slots] and during[used] > before[used]):
        assert not running.done()
    assert during[used] < during["steerllm_shared_memory_limit_bytes", ("captures",)]
    assert during["steerllm_shared_memory_segments", ()] == before["steerllm_shared_memory_segments", ()] + 1
    generation = await running

    held = await series(server.metrics_port)
    rows = generation.outputs[0].receipt.rows_captured
    name, kind = "steerllm_stored_capture_bytes", ("held",)
    assert held[name, kind] - before[name, kind] == rows * 576 * 2
    assert [held["steerllm_bank_slots", (state,)] for state in ("used", "free")] == [
        0,
        before["steerllm_bank_slots", ("free",)] - 1,
    ]
    count = "steerllm_inter_token_latency_seconds_count", ()
    assert 1 <= held[count] - before[count] <= TOKENS - 1  # vLLM joins tokens that wait while the machine is busy

    assert generation.outputs[0].held is not None
    await generation.outputs[0].held.release()
    assert (await series(server.metrics_port))[name, kind] == before[name, kind]
