"""Measures what Envoy beside a server adds to calls, and how fast captures pass it: `python -m bench.through_envoy`.

The server is the fake one, so that nothing but the service and the connection takes time. The ways take turns.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc
import trustme

from bench.results import add_arguments, keep
from steer_client import AsyncSteerClient, CaptureDelivery, CaptureSpec, tls_credentials
from steer_service.wire.generation_pb2 import GenerateRequest, SamplingOptions
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from steer_service.wire.info_pb2 import GetServerInfoRequest
from steer_service.wire.info_pb2_grpc import InfoServiceStub
from tests.deploy.fleet import Certificates, envoy, own_addresses, own_host, replicas

DIRECT, DIRECT_TLS, SIDECAR, SIDECAR_TLS = "direct", "direct, TLS", "sidecar", "sidecar, TLS"
WAYS = (DIRECT, DIRECT_TLS, SIDECAR, SIDECAR_TLS)
CALLS = 200
"""Calls of one way in a round."""
HIDDEN, LAYERS, ROWS = 4096, 4, 2000
TOTAL = HIDDEN * LAYERS * ROWS * 4
"""Bytes of the capture: 125 MiB."""


@contextmanager
def addresses(folder: Path) -> Any:
    """The address of each way, and the certificates."""
    host, plain_host = own_host(), own_host()
    tls = Certificates.write(folder, trustme.CA(), host)
    secure = {"tls_cert": tls.cert, "tls_key": tls.key}
    [plain], own = own_addresses(1), f"{host}:50051"
    with ExitStack() as stack:
        stack.enter_context(replicas(plain, hidden_size=HIDDEN))
        stack.enter_context(replicas(own, hidden_size=HIDDEN, **secure))
        sidecar = stack.enter_context(envoy(folder, [plain], file="sidecar.yaml", host=plain_host))
        with_tls = stack.enter_context(envoy(folder, [plain], tls, file="sidecar.yaml", host=host))
        yield dict(zip(WAYS, (plain, own, sidecar.address, with_tls.address), strict=True)), tls


class Way:
    """The connections of one way."""

    def __init__(self, client: AsyncSteerClient, channel: grpc.aio.Channel) -> None:
        self.client = client
        self.channel = channel

    async def unary(self) -> float:
        """Milliseconds of a small call."""
        start = time.perf_counter()
        await InfoServiceStub(self.channel).GetServerInfo(GetServerInfoRequest())
        return (time.perf_counter() - start) * 1000

    async def first_message(self) -> float:
        """Milliseconds to the first message of Generate."""
        request = GenerateRequest(text="one two three", sampling=SamplingOptions(max_tokens=1))
        start = time.perf_counter()
        call = GenerationServiceStub(self.channel).Generate(request)
        await call.read()
        spent = (time.perf_counter() - start) * 1000
        while await call.read() is not grpc.aio.EOF:
            pass
        return spent

    async def held(self) -> Any:
        """A capture that this way's server holds."""
        capture = CaptureSpec(layers=tuple(range(LAYERS)), delivery=CaptureDelivery.HELD)
        _, [handle] = await self.client.generate([list(range(ROWS))], max_tokens=1, capture=capture)
        return handle


async def fetched(handle: Any) -> float:
    """MB/s of a fetch, checked and in arrays."""
    start = time.perf_counter()
    rows = await handle.fetch_rows()
    spent = time.perf_counter() - start
    assert sum(hidden.nbytes for hidden in rows.after.values()) == TOTAL
    return TOTAL / spent / 1e6


@asynccontextmanager
async def ways(folder: Path) -> AsyncIterator[Mapping[str, Way]]:
    """All ways, connected."""
    with addresses(folder) as (found, tls):
        async with AsyncExitStack() as stack:
            made = {}
            for name, address in found.items():
                given = tls_credentials(ca=tls.ca, cert=tls.cert, key=tls.key) if "TLS" in name else None
                client = await stack.enter_async_context(AsyncSteerClient(address, credentials=given))
                channel = (
                    grpc.aio.secure_channel(address, given) if given is not None else grpc.aio.insecure_channel(address)
                )
                made[name] = Way(client, await stack.enter_async_context(channel))
            yield made


async def alternating(names: Mapping[str, Callable[[], Awaitable[float]]], count: int) -> dict[str, list[float]]:
    """Results of each, `count` times, in turns whose order is random."""
    results: dict[str, list[float]] = {name: [] for name in names}
    chance = random.Random(0)
    for _ in range(count):
        for name in chance.sample(list(names), len(names)):
            results[name].append(await names[name]())
    return results


async def measure(rounds: int) -> dict[str, Any]:
    """The results by what was measured and by way."""
    with tempfile.TemporaryDirectory() as folder:
        async with ways(Path(folder)) as made:
            result: dict[str, Any] = {}
            kinds = {
                "unary_ms": {name: way.unary for name, way in made.items()},
                "first_message_ms": {name: way.first_message for name, way in made.items()},
            }
            for kind, measured in kinds.items():
                await alternating(measured, 20)  # warms up
                taken = await alternating(measured, CALLS * rounds)
                result[kind] = {
                    name: {"p50": round(median(all_), 3), "p99": round(quantiles(all_, n=100)[-1], 3)}
                    for name, all_ in taken.items()
                }
            handles = {name: await way.held() for name, way in made.items()}
            fetches = {name: (lambda handle=handle: fetched(handle)) for name, handle in handles.items()}
            await alternating(fetches, 1)
            taken = await alternating(fetches, rounds)
            result["fetch_mb_per_s"] = {name: round(median(all_)) for name, all_ in taken.items()}
            result["fetch_vs_direct"] = {
                name: round(median(one / own for one, own in zip(all_, taken[DIRECT], strict=True)), 2)
                for name, all_ in taken.items()
            }
            for handle in handles.values():
                await handle.close()
            return result


def main() -> None:
    """Measures and prints; `--out` adds the results to a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.through_envoy", description=__doc__)
    add_arguments(parser, rounds=10)
    options = parser.parse_args()
    result = asyncio.run(measure(options.rounds))
    for kind, by_way in result.items():
        print(kind, *(f"\n  {name}: {value}" for name, value in by_way.items()), sep="", file=sys.stderr)
    keep({"through_envoy": result}, options.out)


if __name__ == "__main__":
    main()
