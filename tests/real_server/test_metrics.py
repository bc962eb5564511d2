"""The HTTP port of a real server: vLLM's series as routers and autoscalers of inference servers read them."""

import pytest

from steer_client import AsyncSteerClient
from tests.real_server.serving import Server
from tests.server.test_http_listener import get, series

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OF_ROUTERS = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
}
"""Series that endpoint pickers and autoscalers need by these names."""


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
