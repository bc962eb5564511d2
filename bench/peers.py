"""vLLM's own servers, to which ours is compared: each in a process of its own, with a thin client.

`http` is the OpenAI server. `vllm_grpc` is vLLM's gRPC server, whose servicer is a separate package; bench/README.md
says how to install it. Both are started by their modules, not by the command `vllm`. That command looks for a
distribution called `vllm`, and the one for CPUs has another name.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load import Batch, Timing, WorkNotDone, prompts_for, timed

PACKAGES = Path(__file__).with_name(".peers")
"""The folder of the gRPC server's packages, which nothing else imports."""

ROOT = Path(__file__).parents[1]
"""The folder of the package `bench`, for the executor without a model."""

HTTP_SERVER = "vllm.entrypoints.openai.api_server"
GRPC_SERVER = "vllm.entrypoints.launchers.grpc_server"

NO_WARM_UP = {"SMG_VLLM_SERVICER_WARMUP": "off"}
"""Turns off the gRPC server's own warm-up: up to 128 requests at once, for minutes on a CPU, even after it reports that
it is healthy. It would slow that server down during a measurement. The benchmark warms up every participant."""

READY_LIMIT_S = 300.0
POLL_S = 0.1
VOCAB_SIZE = 49_152
"""Vocabulary of the bundled model, which peers do not report."""

CountTokens = Callable[[tuple[int, ...], int], Awaitable[int]]
"""(prompt, tokens to generate) -> the number of received tokens; the response is read as it arrives."""


@dataclass(frozen=True, slots=True)
class VLLMServer:
    """One of vLLM's servers."""

    process: asyncio.subprocess.Process
    model: str
    port: int
    """The port on which it listens once it is ready."""

    async def until(self, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Waits until it is ready; raises WorkNotDone if it ends or takes too long."""
        deadline = time.monotonic() + READY_LIMIT_S
        while not await is_ready():
            if self.process.returncode is not None or time.monotonic() > deadline:
                raise WorkNotDone(f"vLLM's server is not ready, its exit status is {self.process.returncode}")
            await asyncio.sleep(POLL_S)


@asynccontextmanager
async def vllm_server(module: str, model: str, **arguments: Any) -> AsyncIterator[VLLMServer]:
    """The server in `module`, with these engine arguments; it ends with the block."""
    port = _free_port()
    given = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items() if value not in (True, False)]
    switches = [f"--{name.replace('_', '-')}" for name, value in arguments.items() if value is True]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, "--model", model, "--host", "127.0.0.1", "--port", str(port)),
        *(*given, *switches),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=sys.stderr,  # the child's own standard output is for its timings
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": f"{PACKAGES}:{ROOT}", **NO_WARM_UP},
    )
    try:
        yield VLLMServer(process, model, port)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def run_peer(count_tokens: CountTokens, batch: Batch) -> Timing:
    """Runs a batch of unsteered requests on a peer."""
    seconds, counts = await timed([count_tokens(prompt, batch.max_tokens) for prompt in prompts_for(batch, VOCAB_SIZE)])
    if counts != [batch.max_tokens] * batch.requests:
        raise WorkNotDone(f"got {counts} tokens, expected {batch.max_tokens} for each request")
    return Timing(tokens=sum(counts), seconds=seconds)


@asynccontextmanager
async def http_client(server: VLLMServer) -> AsyncIterator[CountTokens]:
    """Streams completions of the OpenAI server, one event for each token."""
    import aiohttp

    base = f"http://127.0.0.1:{server.port}"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def is_ready() -> bool:
            try:
                async with session.get(f"{base}/health") as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        async def count_tokens(prompt: tuple[int, ...], max_tokens: int) -> int:
            body = {
                "model": server.model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0,
                "ignore_eos": True, "stream": True, "return_token_ids": True,
            }  # fmt: skip
            count = 0
            async with session.post(f"{base}/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            count += len(choice.get("token_ids") or ())
            return count

        await server.until(is_ready)
        yield count_tokens


@asynccontextmanager
async def grpc_client(server: VLLMServer) -> AsyncIterator[CountTokens]:
    """Streams tokens of vLLM's gRPC server."""
    import grpc

    sys.path.append(str(PACKAGES))
    from smg_grpc_proto import vllm_engine_pb2 as messages
    from smg_grpc_proto import vllm_engine_pb2_grpc as stubs

    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        engine = stubs.VllmEngineStub(channel)

        async def is_ready() -> bool:
            try:
                return bool((await engine.HealthCheck(messages.HealthCheckRequest())).healthy)
            except grpc.aio.AioRpcError:
                return False

        async def count_tokens(prompt: tuple[int, ...], max_tokens: int) -> int:
            request = messages.GenerateRequest(
                request_id=uuid.uuid4().hex,
                tokenized=messages.TokenizedInput(input_ids=prompt),
                sampling_params=messages.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
                stream=True,
            )
            count = 0
            async for response in engine.Generate(request):
                count += len(response.chunk.token_ids)
            return count

        await server.until(is_ready)
        yield count_tokens


PEERS = {"http": (HTTP_SERVER, http_client), "vllm_grpc": (GRPC_SERVER, grpc_client)}
"""Kind of child -> (module of the server, its client)."""
