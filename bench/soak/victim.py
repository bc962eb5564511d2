"""A client that is killed: `python -m bench.soak.victim ADDRESS OWNER ID REQUEST_HEX` streams until it is.

It runs the request twice, once under the id, and holds all captures. It says "streaming" at its first token.
"""

import asyncio
import sys

from bench.soak.calls import channel_to, generating
from steer_service.wire.generation_pb2 import GenerateRequest


async def main(address: str, owner: str, id: str, request_hex: str) -> None:
    request = GenerateRequest.FromString(bytes.fromhex(request_hex))
    async with channel_to(address) as channel:
        generate = generating(channel)

        async def stream(name: str) -> None:
            asked = GenerateRequest(request_id=name)
            asked.MergeFrom(request)
            asked.request_id = name
            async for response in generate(asked, metadata=(("steer-client-id", owner),)):
                if name and response.WhichOneof("event") == "token":
                    print("streaming", flush=True)

        await asyncio.gather(stream(id), stream(""))
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
