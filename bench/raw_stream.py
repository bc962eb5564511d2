"""A bare grpc.aio response stream of bytes, for scale: no messages, rows or checksums. `python -m bench.raw_stream`."""

import asyncio
from collections.abc import AsyncIterator

import grpc

METHOD = "/bench.Raw/Stream"


async def _stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    total, chunk = (int(number) for number in request.split())
    data = bytes(chunk)
    for _ in range(total // chunk):
        yield data


async def serve() -> None:
    """Prints its address and serves until the process ends."""
    server = grpc.aio.server(compression=grpc.Compression.NoCompression)
    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(_stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Raw", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def read(address: str, total: int, chunk: int) -> int:
    """Reads a response stream of `total` bytes in chunks of `chunk`; returns the number of bytes received."""
    async with grpc.aio.insecure_channel(address) as channel:
        received = 0
        async for data in channel.unary_stream(METHOD)(b"%d %d" % (total, chunk)):
            received += len(data)
    return received


if __name__ == "__main__":
    asyncio.run(serve())
