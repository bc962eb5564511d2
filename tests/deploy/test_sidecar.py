"""Envoy with deploy/envoy/sidecar.yaml beside a server, and edges in front of it with client certificates."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from steer_client import AsyncSteerClient, EngineFailed, tls_credentials
from steer_service.wire.capture_pb2 import CAPTURE_DELIVERY_HELD, CaptureSpec, FetchCaptureRequest
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from tests.deploy.conftest import NAME, Issue
from tests.deploy.fleet import envoy, own_addresses, own_host, replicas, until
from tests.server.served import bounded, text_request


async def test_a_client_with_a_certificate_reaches_a_server_on_a_unix_socket(issue: Issue, tmp_path: Path) -> None:
    host = own_host()
    certificates, stranger = issue(host), issue("stranger")
    address = f"unix:{tmp_path}/server.sock"
    mine = tls_credentials(ca=certificates.ca, cert=stranger.cert, key=stranger.key)
    with replicas(address), envoy(tmp_path, [address], certificates, file="sidecar.yaml", host=host) as proxy:
        async with AsyncSteerClient(proxy.address, credentials=mine) as client:
            assert await bounded(client.generate("one two", max_tokens=2))
        for credentials in (tls_credentials(ca=certificates.ca), None):
            async with AsyncSteerClient(proxy.address, credentials=credentials, unary_timeout_s=5) as client:
                with pytest.raises(EngineFailed):
                    await bounded(client.load_info())


async def test_an_edge_with_client_certificates_reaches_servers_through_their_sidecars(
    issue: Issue, tmp_path: Path
) -> None:
    """The health of the server passes its sidecar: the edge stops sending when the server drains."""
    edge_host, sidecar_host = own_host(), own_host()
    certificates = issue(edge_host, sidecar_host)
    mine = tls_credentials(ca=certificates.ca, cert=certificates.cert, key=certificates.key)
    [address] = own_addresses(1)
    with (
        replicas(address) as [server],
        envoy(tmp_path, [address], certificates, file="sidecar.yaml", host=sidecar_host) as sidecar,
        envoy(
            *(tmp_path, [sidecar.address], certificates),
            file="edge_mtls.yaml",
            host=edge_host,
            with_blocks=True,
        ) as edge,
    ):
        await asyncio.to_thread(until, lambda: edge.healthy() == {sidecar.address})
        async with AsyncSteerClient(edge.address, credentials=mine) as client:
            assert await bounded(client.generate("one two", max_tokens=2))
        async with AsyncSteerClient(edge.address, credentials=tls_credentials(ca=certificates.ca)) as client:
            with pytest.raises(EngineFailed):
                await bounded(client.load_info())
        server.begin_drain()
        await asyncio.to_thread(until, lambda: not edge.healthy())


class Noting(grpc.GenericRpcHandler):
    """A server that is healthy, and notes what it gets as x-forwarded-client-cert."""

    def __init__(self) -> None:
        self.got: list[str] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            if details.method == "/grpc.health.v1.Health/Check":
                return health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
            metadata = dict(context.invocation_metadata() or ())
            self.got.append(str(metadata.get("x-forwarded-client-cert", "")))
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.mark.parametrize("file", ["edge.yaml", "edge_mtls.yaml", "sidecar.yaml"])
async def test_the_names_in_a_certificate_reach_the_server_and_claims_do_not(
    file: str, issue: Issue, tmp_path: Path
) -> None:
    host, [address], noting = own_host(), own_addresses(1), Noting()
    tls = issue(host)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([noting])
    server.add_insecure_port(address)
    await server.start()
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes())
    claim = (("x-forwarded-client-cert", "URI=spiffe://someone/else"),)
    with ExitStack() as stack:
        proxy = await asyncio.to_thread(stack.enter_context, envoy(tmp_path, [address], tls, file=file, host=host))
        if file != "sidecar.yaml":  # which checks no health
            await asyncio.to_thread(until, lambda: proxy.healthy() == {address})
        async with grpc.aio.secure_channel(proxy.address, credentials) as channel:
            await bounded(channel.unary_unary("/x.Echo/Call")(b"", metadata=claim))
    await server.stop(0)
    [said] = noting.got
    assert "someone" not in said
    assert (f"DNS={NAME}" in said) == (file != "edge.yaml")


async def test_the_name_in_the_certificate_that_envoy_saw_owns_what_the_call_leaves(
    tmp_path: Path, issue: Issue
) -> None:
    host, [address] = own_host(), own_addresses(1)
    with (
        replicas(address, trusted_proxy="loopback") as (_,),
        envoy(tmp_path, [address], issue(host), file="sidecar.yaml", host=host) as proxy,
    ):
        fetched = []
        for name in ("alice.example", "bob.example"):
            own = issue(name)
            credentials = tls_credentials(ca=own.ca, cert=own.cert, key=own.key)
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.secure_channel(proxy.address, credentials, options=options) as channel:
                me = (("steer-client-id", "the-same-for-both"),)
                if not fetched:
                    capture = CaptureSpec(layers=[1], delivery=CAPTURE_DELIVERY_HELD)
                    call = GenerationServiceStub(channel).Generate(text_request(capture=capture), metadata=me)
                    [held] = [one.capture_held async for one in call if one.HasField("capture_held")]
                request = FetchCaptureRequest(capture_id=held.capture_id)
                call = CaptureServiceStub(channel).FetchCapture(request, metadata=me)
                try:
                    fetched.append(len([response async for response in call]))
                except grpc.aio.AioRpcError as error:
                    fetched.append(error.code())
    assert fetched == [1, grpc.StatusCode.NOT_FOUND]
