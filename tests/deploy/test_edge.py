"""What passes through Envoy with deploy/envoy/edge.yaml, with TLS, in front of two servers."""

import asyncio
import json
import os
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steer_client import (
    AsyncSteerClient,
    CaptureDelivery,
    CaptureSite,
    CaptureSpec,
    EngineFailed,
    InvalidRequest,
    tls_credentials,
)
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from steer_service.wire.status_codes import error_from_rpc
from tests.deploy.conftest import Fleet, Issue
from tests.deploy.fleet import BOUND_S, envoy, instance_of, own_addresses, own_host, until
from tests.server.served import bounded, text_request

PROMPT = "one two three"
CAPTURE = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH)


@pytest.fixture
async def channel(fleet: Fleet) -> AsyncIterator[grpc.aio.Channel]:
    credentials = grpc.ssl_channel_credentials(fleet.certificates.ca.read_bytes())
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(fleet.envoy.address, credentials, options=own) as made:
        yield made


async def served_by(channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> str:
    """The instance that answered a request with this metadata; Envoy does not say it if it was asked for."""
    call = GenerationServiceStub(channel).Generate(text_request(PROMPT), metadata=metadata)
    await bounded(all_of(call))
    said = [str(value) for key, value in await call.initial_metadata() or () if key == "steer-instance"]
    return said[0] if said else dict(metadata)["steer-instance"]


async def all_of(call: Any) -> list[Any]:
    return [response async for response in call]


async def test_calls_of_many_clients_reach_both_replicas(channel: grpc.aio.Channel, fleet: Fleet) -> None:
    counts = Counter([await served_by(channel, ("steer-client-id", f"client-{number}")) for number in range(40)])
    assert set(counts) == {replica.instance for replica in fleet.replicas}


async def test_calls_of_one_client_reach_one_replica(channel: grpc.aio.Channel) -> None:
    counts = Counter([await served_by(channel, ("steer-client-id", "alice")) for _ in range(20)])
    assert len(counts) == 1


async def test_calls_without_a_client_id_reach_both_replicas(channel: grpc.aio.Channel) -> None:
    counts = Counter([await served_by(channel) for _ in range(40)])
    assert len(counts) == 2


async def test_a_call_that_names_its_replica_gets_there_also_if_the_name_is_not_from_envoy(
    channel: grpc.aio.Channel, fleet: Fleet
) -> None:
    for replica in fleet.replicas:
        before = served_calls(fleet, replica.address)
        for number in range(10):
            metadata = (("steer-client-id", f"client-{number}"), ("steer-instance", replica.instance))
            assert await served_by(channel, *metadata) == replica.instance
        until(lambda before=before, address=replica.address: served_calls(fleet, address) == before + 10)


@pytest.mark.parametrize("balancing", ["ROUND_ROBIN", "LEAST_REQUEST"])
async def test_with_another_balancing_calls_of_one_client_reach_both_and_a_named_replica_alone(
    fleet: Fleet, balancing: str, tmp_path: Path
) -> None:
    addresses = [replica.address for replica in fleet.replicas]
    alice = ("steer-client-id", "alice")
    with envoy(tmp_path, addresses, balancing=balancing) as proxy:
        await asyncio.to_thread(until, lambda: proxy.healthy() == set(addresses))
        async with grpc.aio.insecure_channel(proxy.address) as channel:
            assert len({await served_by(channel, alice) for _ in range(40)}) == 2
            named = ("steer-instance", fleet.replicas[0].instance)
            assert {await served_by(channel, alice, named) for _ in range(10)} == {fleet.replicas[0].instance}


def served_calls(fleet: Fleet, address: str) -> int:
    """Calls that Envoy has sent to a replica."""
    [count] = [
        int(stat["value"])
        for cluster in json.loads(fleet.envoy.get("/clusters?format=json"))["cluster_statuses"]
        for host in cluster.get("host_statuses", ())
        if "{address}:{port_value}".format(**host["address"]["socket_address"]) == address
        for stat in host["stats"]
        if stat["name"] == "rq_total"
    ]
    return count


@pytest.mark.parametrize("named", [instance_of("127.0.0.1:1"), instance_of("not an address"), "%%%", ""])
async def test_a_call_that_names_no_replica_is_balanced(channel: grpc.aio.Channel, fleet: Fleet, named: str) -> None:
    alice = ("steer-client-id", "alice")
    assert await served_by(channel, alice, ("steer-instance", named)) == await served_by(channel, alice)


@pytest.mark.parametrize("delivery", CaptureDelivery)
async def test_captures_come_by_every_delivery(fleet: Fleet, delivery: CaptureDelivery) -> None:
    """In shared memory they pass Envoy by: both processes are on this host."""
    capture = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, delivery=delivery)
    direct = FakeBackend()
    async with fleet.client() as client:
        for _ in range(3):
            [generation], [handle] = await client.generate(PROMPT, max_tokens=5, capture=capture, raw_output=True)
            [expected], [own] = await direct.generate(PROMPT, max_tokens=5, capture=CAPTURE, raw_output=True)
            assert generation.capture_delivery is delivery.in_process
            assert generation.outputs[0].token_ids == expected.outputs[0].token_ids
            async with handle, own:
                assert_same_rows(await handle.fetch_rows(), await own.fetch_rows())


def assert_same_rows(one: Any, other: Any) -> None:
    for mine, theirs in ((one.before, other.before), (one.after, other.after)):
        assert set(mine) == set(theirs)
        for layer in mine:
            np.testing.assert_array_equal(mine[layer], theirs[layer])


def test_no_limit_on_the_time_of_a_response_is_in_force(fleet: Fleet) -> None:
    """Envoy's own default would cut a response after 15 s."""
    dump = json.loads(fleet.envoy.get("/config_dump?include_eds"))
    [found] = [one for one in dump["configs"] if one["@type"].endswith("ListenersConfigDump")]
    [clients] = [one for one in found["static_listeners"] if one["listener"]["name"] == "clients"]
    http = clients["listener"]["filter_chains"][0]["filters"][0]["typed_config"]
    assert http["stream_idle_timeout"] == "600s"
    routes = http["route_config"]["virtual_hosts"][0]["routes"]
    assert {route["route"]["timeout"] for route in routes} == {"0s"}


async def test_a_request_larger_than_what_envoy_keeps_passes(channel: grpc.aio.Channel) -> None:
    """It is sent on as it comes, and only cannot be repeated."""
    call = GenerationServiceStub(channel).Generate(text_request("w" * (5 << 20), max_tokens=1))
    assert (await bounded(all_of(call)))[-1].HasField("completed")


async def test_errors_pass_with_their_details(channel: grpc.aio.Channel) -> None:
    request = text_request(PROMPT)
    request.sampling.temperature = -1.0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(all_of(GenerationServiceStub(channel).Generate(request)))
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == "sampling.temperature"


async def test_errors_that_clients_cause_eject_no_replica(channel: grpc.aio.Channel, fleet: Fleet) -> None:
    for _ in range(12):
        call = channel.unary_unary("/steer.v1.InfoService/NoSuchMethod")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bounded(call(b"", metadata=(("steer-client-id", "alice"),)))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert fleet.envoy.counter("cluster.replicas.outlier_detection.ejections_enforced_total") == 0


async def test_a_wrong_authority_and_no_tls_are_refused(fleet: Fleet, tmp_path: Any) -> None:
    for credentials in (None, tls_credentials()):
        async with AsyncSteerClient(fleet.envoy.address, credentials=credentials, unary_timeout_s=5.0) as client:
            with pytest.raises(EngineFailed):
                await bounded(client.load_info())


def test_a_certificate_that_is_replaced_is_read_again(issue: Issue, tmp_path: Path) -> None:
    host = own_host()
    first, second = issue(host), issue(host)
    with envoy(tmp_path, own_addresses(1), first, host=host) as proxy:

        def served() -> str:
            return ssl.get_server_certificate((host, 8443), timeout=BOUND_S)

        own, new = served(), second.cert.read_text()
        assert own in first.cert.read_text()
        os.replace(second.key, first.key)
        os.replace(second.cert, first.cert)
        until(lambda: served() in new)
        assert proxy.is_ready


async def test_health_checks_pass(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    service = health_pb2.HealthCheckRequest(service="steer.v1.GenerationService")
    assert (await bounded(stub.Check(service))).status == health_pb2.HealthCheckResponse.SERVING
    watching = stub.Watch(service)
    assert (await bounded(watching.read())).status == health_pb2.HealthCheckResponse.SERVING
    watching.cancel()


async def test_request_ids_are_made_and_kept(channel: grpc.aio.Channel) -> None:
    ids = []
    for metadata in ((), (("x-request-id", "mine-1"),)):
        call = GenerationServiceStub(channel).Generate(text_request(PROMPT), metadata=metadata)
        await bounded(all_of(call))
        ids.append(dict(await call.initial_metadata() or ())["x-request-id"])
    assert len(ids[0]) == 36
    assert ids[1] == "mine-1"


async def test_names_with_underscores_are_refused(channel: grpc.aio.Channel) -> None:
    """A server may take them for those with hyphens that Envoy has checked."""
    call = GenerationServiceStub(channel).Generate(text_request(PROMPT), metadata=(("steer_client_id", "alice"),))
    with pytest.raises(grpc.aio.AioRpcError):
        await bounded(all_of(call))


async def test_the_access_log_has_the_call_and_no_secret(channel: grpc.aio.Channel, fleet: Fleet) -> None:
    secrets = (("authorization", "Bearer swordfish"), ("steer-client-id", "opensesame"), ("x-request-id", "log-1"))
    await served_by(channel, *secrets)
    until(lambda: '"log-1"' in fleet.envoy.log.read_text())
    [line] = [line for line in fleet.envoy.log.read_text().splitlines() if '"log-1"' in line]
    entry = json.loads(line)
    assert entry["path"] == "/steer.v1.GenerationService/Generate"
    assert (entry["grpc_status"], entry["attempts"]) == ("OK", 1)
    assert not any(word in fleet.envoy.log.read_text() for word in ("swordfish", "opensesame"))


def test_prometheus_gets_the_series_and_nobody_gets_the_admin_port(fleet: Fleet) -> None:
    assert "envoy_cluster_membership_healthy" in fleet.envoy.get("/stats/prometheus", port=9902)
    assert fleet.envoy.get("/ready", port=9902) == "LIVE\n"
    for path, method in (
        ("/config_dump", "GET"),
        ("/quitquitquit", "POST"),
        ("/stats/prometheus/../../quitquitquit", "POST"),
    ):
        with pytest.raises(OSError, match="404"):
            fleet.envoy.get(path, port=9902, method=method)
