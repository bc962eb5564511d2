"""The life of a server: listening, loading, serving, draining; health and reflection all the way."""

import asyncio
import importlib.metadata
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from steer_service.core.errors import EngineFailed, InvalidRequest, NotFound
from steer_service.server.app import SERVICES, SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.wire import info_pb2
from steer_service.wire.info import model_info_from_proto
from steer_service.wire.status_codes import error_from_rpc
from tests.server.served import BOUND_S, Gate, Serve, Served, bounded, text_request


async def wait_for_health(served: Served, wanted: str) -> None:
    async def until() -> None:
        while set((await served.statuses()).values()) != {wanted}:
            await asyncio.sleep(0)

    await bounded(until())


async def test_while_the_model_loads_health_is_not_serving_and_requests_are_refused_for_now(serve: Serve):
    served = await serve(opened=False)
    assert set((await served.statuses()).values()) == {"NOT_SERVING"}
    failure = await served.failure(text_request())
    assert failure.code() == grpc.StatusCode.UNAVAILABLE
    error = error_from_rpc(failure)
    assert (type(error), error.reason, error.retry_after_s) == (EngineFailed, "LOADING", 1.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(served.info.GetModel(info_pb2.GetModelRequest()))
    assert error_from_rpc(caught.value).reason == "LOADING"


async def test_the_server_serves_only_after_a_generation_succeeded(serve: Serve):
    gate = Gate(at=0)
    served = await serve(FakeBackend(step=gate), opened=False)
    opening = asyncio.ensure_future(served.server.open(served.backend))
    await bounded(gate.reached.wait())
    assert set((await served.statuses()).values()) == {"NOT_SERVING"}
    gate.opened.set()
    await bounded(opening)
    assert set((await served.statuses()).values()) == {"SERVING"}
    assert (await served.generate(text_request()))[-1].HasField("completed")


async def test_a_failed_warm_up_leaves_the_server_closed(serve: Serve):
    served = await serve(FakeBackend(failure=EngineFailed("broken")), opened=False)
    with pytest.raises(EngineFailed):
        await bounded(served.server.open(served.backend))
    assert set((await served.statuses()).values()) == {"NOT_SERVING"}


async def test_a_watcher_of_health_sees_every_change(serve: Serve):
    served = await serve(opened=False)
    watch = served.health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await bounded(watch.read())).status == not_serving
    await served.server.open(served.backend)
    assert (await bounded(watch.read())).status == serving
    draining = asyncio.ensure_future(served.server.drain())
    assert (await bounded(watch.read())).status == not_serving
    watch.cancel()
    await bounded(draining)


class Mortal(FakeBackend):
    lives = True

    @property
    def is_alive(self) -> bool:
        return self.lives


async def test_a_backend_that_dies_while_idle_turns_health_off(serve: Serve):
    served = await serve(Mortal())
    assert set((await served.statuses()).values()) == {"SERVING"}
    served.backend.lives = False
    await bounded(served.server.engine_died.wait())
    await wait_for_health(served, "NOT_SERVING")


async def test_draining_lets_requests_finish_and_refuses_new_ones(serve: Serve):
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    running = asyncio.ensure_future(served.generate(text_request()))
    await bounded(gate.reached.wait())
    draining = asyncio.ensure_future(served.server.drain())
    await wait_for_health(served, "NOT_SERVING")
    failure = await served.failure(text_request())
    assert failure.code() == grpc.StatusCode.UNAVAILABLE
    assert error_from_rpc(failure).reason == "DRAINING"
    gate.opened.set()
    assert (await bounded(running))[-1].HasField("completed")
    await bounded(draining)
    assert served.backend.closed


async def test_requests_that_outlast_the_grace_end_with_draining(serve: Serve):
    gate = Gate()
    served = await serve(grace_s=0.1)
    served.backend.step = gate
    running = asyncio.ensure_future(served.failure(text_request()))
    await bounded(gate.reached.wait())
    await bounded(served.server.drain())
    failure = await bounded(running)
    assert failure.code() == grpc.StatusCode.UNAVAILABLE
    assert error_from_rpc(failure).reason == "DRAINING"
    assert served.backend.aborted == 1
    assert served.backend.closed


async def test_hurry_cuts_the_grace(serve: Serve):
    gate = Gate()
    served = await serve(grace_s=1000)
    served.backend.step = gate
    running = asyncio.ensure_future(served.failure(text_request()))
    await bounded(gate.reached.wait())
    draining = asyncio.ensure_future(served.server.drain())
    await wait_for_health(served, "NOT_SERVING")
    served.server.stop_now()
    await bounded(draining)
    assert (await bounded(running)).code() == grpc.StatusCode.UNAVAILABLE


async def test_port_zero_picks_a_port_and_a_second_server_cannot_share_it(serve: Serve):
    served = await serve()
    port = int(served.server.address.rpartition(":")[2])
    assert port > 0
    with pytest.raises(EngineFailed, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
        await SteerServer(ServerConfig(address=served.server.address)).listen()


async def test_a_unix_socket_serves_and_is_not_stolen_by_a_second_server(serve: Serve, tmp_path: Path):
    address = f"unix:{tmp_path}/s"
    served = await serve(address=address)
    assert served.server.address == address
    assert (await served.generate(text_request()))[-1].HasField("completed")
    with pytest.raises(EngineFailed, match="Address already in use"):
        await SteerServer(ServerConfig(address=address)).listen()
    assert (await served.generate(text_request()))[-1].HasField("completed")
    await bounded(served.server.drain())


async def test_a_unix_socket_left_behind_is_taken_over(serve: Serve, tmp_path: Path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    served = await serve(address=f"unix:{path}")
    assert (await served.generate(text_request()))[-1].HasField("completed")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:x", "127.0.0.1:99999", ":1"])
async def test_an_invalid_address_is_refused(address: str):
    with pytest.raises(InvalidRequest):
        await SteerServer(ServerConfig(address=address)).listen()


async def test_an_unknown_host_is_one_plain_error():
    with pytest.raises(EngineFailed, match=r"cannot listen on 192\.0\.2\.1:50051: "):
        await SteerServer(ServerConfig(address="192.0.2.1:50051")).listen()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_every_service(serve: Serve, version: str):
    served = await serve()
    method = served.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {service.name for service in (await bounded(call.read())).list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= listed
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="steer.v1.GenerationService"))
    assert (await bounded(call.read())).file_descriptor_response.file_descriptor_proto
    await call.done_writing()


async def test_facts_about_server_and_model(serve: Serve):
    served = await serve(max_message_bytes=12345)
    answer = await bounded(served.info.GetServerInfo(info_pb2.GetServerInfoRequest()))
    assert answer.limits.max_message_bytes == 12345
    assert info_pb2.FEATURE_STEERING in answer.features
    assert info_pb2.FEATURE_TIME_BUDGET in answer.features
    model = await bounded(served.info.GetModel(info_pb2.GetModelRequest(name=FAKE_MODEL.name)))
    assert model_info_from_proto(model.model) == FAKE_MODEL
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(served.info.GetModel(info_pb2.GetModelRequest(name="other")))
    error = error_from_rpc(caught.value)
    assert (type(error), error.reason, error.field) == (NotFound, "UNKNOWN_MODEL", "name")


async def test_a_server_without_a_version_reports_a_failure(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    served = await serve()
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(served.info.GetServerInfo(info_pb2.GetServerInfoRequest()))
    error = error_from_rpc(caught.value)
    assert (caught.value.code(), type(error)) == (grpc.StatusCode.INTERNAL, EngineFailed)
    assert (error.reason, error.message) == ("INTERNAL", "the server failed")


@pytest.mark.parametrize("is_on", [1, 0])
async def test_features_are_listed_and_shared_memory_can_be_switched_off(serve: Serve, is_on: int):
    served = await serve(shared_memory=is_on)
    answer = await bounded(served.info.GetServerInfo(info_pb2.GetServerInfoRequest()))
    features = {info_pb2.Feature.Name(feature) for feature in answer.features}
    assert {"FEATURE_CAPTURE", "FEATURE_CAPTURE_LIVE", "FEATURE_CAPTURE_HELD"} <= features
    assert ("FEATURE_SHARED_MEMORY" in features) == bool(is_on)
    assert len(features) == len(answer.features)
    assert answer.limits.max_chunk_bytes == 1 << 20


@pytest.mark.parametrize(
    "config",
    [{"shm_dir": "/nowhere"}, {"shm_mode": "666"}, {"shm_mode": "6x"}, {"shm_group": "no such group"}],
    ids=str,
)
async def test_a_directory_for_captures_that_cannot_be_is_refused_by_name(config: dict[str, str]):
    with pytest.raises(InvalidRequest) as caught:
        SteerServer(ServerConfig(address="127.0.0.1:0", **config))
    assert caught.value.field == next(iter(config))


async def test_a_model_lists_its_adapters_and_is_found_under_their_names(serve: Serve):
    info = replace(FAKE_MODEL, adapters=("sea-1", "sea-2"))
    served = await serve(FakeBackend(info))
    for name in ("", info.name, *info.adapters):
        answer = await bounded(served.info.GetModel(info_pb2.GetModelRequest(name=name)))
        assert model_info_from_proto(answer.model) == info


def test_every_setting_has_an_environment_variable():
    config = ServerConfig.from_environment(
        {"STEERLLM_ADDRESS": "unix:/x", "STEERLLM_GRACE_S": "2.5", "STEERLLM_MAX_MESSAGE_BYTES": "5", "OTHER": "x"}
    )
    assert config == ServerConfig(address="unix:/x", grace_s=2.5, max_message_bytes=5)
    assert ServerConfig.from_environment({}) == ServerConfig()


@pytest.mark.parametrize(
    "environment",
    [
        {"STEERLLM_GRACE_S": "soon"},
        {"STEERLLM_GRACE_S": "-1"},
        {"STEERLLM_MAX_MESSAGE_BYTES": "0"},
        {"STEERLLM_MAX_MESSAGE_BYTES": "3000000000"},
        {"STEERLLM_MAX_CONCURRENT_REQUESTS": "many"},
        {"STEERLLM_CLIENT_VECTOR_BYTES": "-1"},
        {"STEERLLM_METRICS_PORT": "65536"},
        {"STEERLLM_METRICS_PORT": "-1"},
        {"STEERLLM_SHARED_MEMORY": "2"},
        {"STEERLLM_HEARTBEAT_S": "nan"},
    ],
    ids=lambda environment: "=".join(*environment.items()),
)
def test_a_bad_setting_is_refused_by_name(environment: dict[str, str]):
    with pytest.raises(InvalidRequest) as refused:
        ServerConfig.from_environment(environment)
    assert [refused.value.field] == list(environment)


def metrics_on(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=BOUND_S) as answer:
        return answer.read().decode()


async def test_metrics_are_read_over_http_until_the_server_has_drained(serve: Serve):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = await serve(metrics_port=port)
    assert 'steerllm_capture_bytes_total{event="reserved"} 0.0' in await asyncio.to_thread(metrics_on, port)
    await bounded(served.server.drain())
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(metrics_on, port)


async def test_a_port_for_metrics_that_is_taken_is_refused(serve: Serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineFailed) as refused:
            await serve(metrics_port=taken.getsockname()[1])
    assert refused.value.reason == "ADDRESS_UNAVAILABLE"
