"""One client of two replicas between which Envoy takes turns: what is on one of them is found by `steer-instance`."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureSpec, SteeringSpec
from tests.client.captures import same
from tests.deploy.fleet import Config, Envoy, envoy, own_addresses, replicas
from tests.server.served import bounded

HIDDEN = 256
HELD = CaptureSpec(layers=(2, 0), delivery=CaptureDelivery.HELD)
SHARED = CaptureSpec(layers=(2, 0), delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED)


def _connection_manager(config: Config) -> Config:
    filters = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    return dict(filters[0]["typed_config"])


def take_turns(config: Config) -> None:
    """As the comment at `lb_policy` offers."""
    [cluster] = [one for one in config["static_resources"]["clusters"] if one["name"] == "replicas"]
    cluster["lb_policy"] = "ROUND_ROBIN"
    del cluster["ring_hash_lb_config"]


def ignore_names(config: Config) -> None:
    """As a balancer that knows nothing of `steer-instance`."""
    take_turns(config)
    filters = _connection_manager(config)["http_filters"]
    filters[:] = [one for one in filters if one["name"] != "envoy.filters.http.stateful_session"]


@pytest.fixture(scope="module", params=[take_turns, ignore_names])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Envoy, bool]]:
    """Envoy, and whether it routes by the name."""
    addresses, folder = own_addresses(2), tmp_path_factory.mktemp("envoy")
    with ExitStack() as stack:
        stack.enter_context(replicas(*addresses, hidden_size=HIDDEN, shared_bytes=1 << 26))
        proxy = stack.enter_context(envoy(folder, addresses, change=request.param))
        yield proxy, request.param is take_turns


@pytest.fixture
async def client(fleet: tuple[Envoy, bool]) -> AsyncIterator[AsyncSteerClient]:
    async with AsyncSteerClient(fleet[0].address) as client:
        yield client


def upstream_calls(proxy: Envoy) -> int:
    return proxy.counter("cluster.replicas.upstream_rq_total")


async def test_every_held_capture_is_fetched_and_released(client: AsyncSteerClient, fleet: tuple[Envoy, bool]) -> None:
    proxy, routes = fleet
    before = upstream_calls(proxy)
    fetched, names = [], set()
    for _ in range(6):
        _, [handle] = await client.generate("a b c", max_tokens=4, capture=HELD)
        names.add(handle._held._instance)
        fetched.append(await bounded(handle.fetch()))
        await bounded(handle.close())
    assert all(same(fetched[0], one) for one in fetched)
    calls = upstream_calls(proxy) - before
    if routes:
        assert (calls, len(names)) == (18, 2)  # a generation, a fetch and a release each: none was repeated
    else:
        assert calls > 18


async def test_shared_memory_that_is_required_is_had_each_time(client: AsyncSteerClient) -> None:
    for _ in range(4):
        [generation], [handle] = await client.generate("a b c", max_tokens=4, capture=SHARED, raw_output=True)
        async with handle:
            assert (await handle.fetch())[0]
        assert generation.capture_delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED


async def test_few_steered_calls_are_sent_twice(client: AsyncSteerClient, fleet: tuple[Envoy, bool]) -> None:
    proxy, routes = fleet
    spec = SteeringSpec.simple_add(1, np.random.default_rng(0).standard_normal(HIDDEN).astype(np.float32))
    before = upstream_calls(proxy)
    for _ in range(12):
        await bounded(client.generate("a b c", max_tokens=1, steering_spec=spec))
    assert upstream_calls(proxy) - before <= (12 if routes else 14)
