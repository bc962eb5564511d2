"""What a real Envoy says when it has no server, or when its limit on a route passes before the response begins."""

import asyncio
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient, EngineFailed
from steer_service.cli.exit_status import FAILED
from steer_service.cli.main import main
from tests.deploy.fleet import Config, envoy, own_addresses, replicas

ONCE = [("grpc.enable_retries", 0)]


def without_health_checks(config: Config) -> None:
    for cluster in config["static_resources"]["clusters"]:
        cluster.pop("health_checks", None)


def impatient(config: Config) -> None:
    without_health_checks(config)
    http = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    for route in http["route_config"]["virtual_hosts"][0]["routes"]:
        route["route"]["timeout"] = "0.3s"


async def failure(address: str) -> EngineFailed:
    async with AsyncSteerClient(address, channel_options=ONCE) as client:
        with pytest.raises(EngineFailed) as raised:
            await client.generate("one two three", max_tokens=5)
    return raised.value


async def test_an_envoy_without_a_server_is_told_from_no_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = own_addresses(1)
    with envoy(tmp_path, addresses) as proxy:
        error = await failure(proxy.address)
        assert await asyncio.to_thread(main, ["healthcheck", "--address", proxy.address]) == FAILED
    assert error.reason == "UNREACHABLE"
    assert error.message.endswith("a proxy there reaches no server behind it: no healthy upstream")
    assert "a proxy answers at" in capsys.readouterr().err


async def test_its_timeouts_have_the_seconds_in_the_sentence(tmp_path: Path) -> None:
    addresses = own_addresses(1)
    with (
        replicas(*addresses, token_s=2.0, max_running_requests=1),
        envoy(tmp_path, addresses, change=impatient) as proxy,
    ):
        begun = await failure(proxy.address)
    assert begun.reason == "CONNECTION_LOST"
    assert "a proxy reset the call after 0." in begun.message
