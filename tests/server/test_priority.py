"""Priorities of requests: served where the engine has them, refused and not announced elsewhere."""

import pytest

from steer_client import AsyncSteerClient
from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import info_pb2
from steer_service.wire.info_pb2_grpc import InfoServiceStub

REQUEST = GenerateRequest(prompt=TextPrompt(text="a b"), sampling=SamplingOptions(max_tokens=1), priority=-3)


class WithPriority(FakeBackend):
    """A backend that takes priorities."""

    has_priority = True


@pytest.mark.parametrize("backend", [FakeBackend(), WithPriority()], ids=["without", "with"])
async def test_a_priority_reaches_an_engine_that_has_priorities(backend: FakeBackend) -> None:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    await server.listen()
    await server.open(backend)
    try:
        async with await AsyncSteerClient.connect(server.address) as client:
            stub = InfoServiceStub(client._channels.for_running_loop())
            features = (await stub.GetServerInfo(info_pb2.GetServerInfoRequest())).features
            assert (info_pb2.FEATURE_PRIORITY in features) == backend.has_priority
            if backend.has_priority:
                await client.complete(REQUEST)
                assert backend.requests[-1].priority == -3
            else:
                with pytest.raises(Unsupported) as refused:
                    await client.complete(REQUEST)
                assert (refused.value.field, refused.value.reason) == ("priority", "NO_PRIORITY")
    finally:
        await server.drain()


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 1.5, True, "1"])
def test_a_priority_that_is_no_number_of_the_contract_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        GenerateRequest(prompt=TextPrompt(text="a"), priority=value)  # type: ignore[arg-type]
    assert refused.value.field == "priority"
