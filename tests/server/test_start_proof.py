"""What an engine proved about itself when it started: GetServerInfo and the metrics show it."""

import pytest

from steer_client import AsyncSteerClient
from steer_service.core.start_proof import StartProof
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import info_pb2
from steer_service.wire.info import start_proof_from_proto
from steer_service.wire.info_pb2_grpc import InfoServiceStub
from tests.wire.test_info import PROOF


class Proven(FakeBackend):
    """A backend that has proven something."""

    start_proof = PROOF


@pytest.mark.parametrize(("backend", "proof"), [(FakeBackend(), None), (Proven(), PROOF)], ids=["nothing", "a proof"])
async def test_the_proof_of_the_open_engine_is_shown(backend: FakeBackend, proof: StartProof | None) -> None:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    await server.listen()
    try:
        async with AsyncSteerClient(server.address) as client:
            stub = InfoServiceStub(client._channels.for_running_loop())
            loading = await stub.GetServerInfo(info_pb2.GetServerInfoRequest())
            await server.open(backend)
            serving = await stub.GetServerInfo(info_pb2.GetServerInfoRequest())
    finally:
        await server.drain()

    assert not loading.HasField("start_proof")
    assert serving.HasField("start_proof") == (proof is not None)
    value = server.metrics.registry.get_sample_value
    if proof is not None:
        assert start_proof_from_proto(serving.start_proof) == proof
        assert value("steerllm_start_proof_seconds") == proof.seconds
        assert value("steerllm_capture_staging_bytes", {"memory": "pinned"}) == proof.pinned_bytes
        labels = {
            "device": "NVIDIA H200",
            "step_classes": "full graph of 8 rows, without graphs of 17 rows",
            "kernel_rows": "192",
            "kernel_error": "0.25",
            "is_exact": "true",
        }
        assert value("steerllm_start_proof_info", labels) == 1.0
    else:
        assert value("steerllm_start_proof_seconds") == 0.0
