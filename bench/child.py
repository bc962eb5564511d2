"""One participant in a process of its own: stock vLLM, our engine and server, a gRPC client, or a peer of the server.

When it is ready it writes its facts, a line of JSON, to its original standard output. It reads a Batch per line from
standard input, also JSON, runs it, and writes a Timing. It exits at the end of standard input. Engine, server and
client are imported where they are used: vLLM's own processes import this file again.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from bench.load import STOCK, Batch, FirstToken, Timing, WorkNotDone, prompts_for, run_batch, timed
from steer_service.server.event_loop import new_event_loop

OURS = "ours"
FAKE = "fake"
CLIENT = "client"
HTTP = "http"
VLLM_GRPC = "vllm_grpc"
"""The kinds of children beside STOCK."""

STUB = "stub"
"""The dtype that stands for no model at all, see stub_executor.py."""

INSIDE = "inside"
"""The mode of a batch that runs nothing: OURS returns its engine's time to the first token of the last request."""

KV_CACHE_BYTES = 512 << 20
"""Bytes: many times what the requests of a run need, and small enough for two engines on a small machine."""


@dataclass(frozen=True, slots=True)
class Participant:
    """A child that is ready."""

    facts: dict[str, Any]
    """Facts about it, sent once."""
    run: Callable[[Batch], Awaitable[Timing]]
    """Runs one batch; raises WorkNotDone if the work is not that of the batch."""


def engine_arguments(dtype: str, compiled: bool) -> dict[str, Any]:
    """The engine arguments of all engines; everything else is vLLM's default."""
    if dtype == STUB:
        from bench import stub_executor

        stub_executor.admit()
        return {"dtype": "bfloat16", "max_model_len": 1024, "enforce_eager": True, **stub_executor.ARGUMENTS}
    return {
        "dtype": dtype,
        "max_model_len": 1024,
        "enforce_eager": not compiled,
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }


@asynccontextmanager
async def stock_vllm(model: str, dtype: str, compiled: bool) -> AsyncIterator[Participant]:
    """vLLM's AsyncLLM with its own worker."""
    import torch
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(model=model, **engine_arguments(dtype, compiled))
    llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments, usage_context=UsageContext.OPENAI_API_SERVER)

    async def run(batch: Batch) -> Timing:
        prompts = prompts_for(batch, llm.model_config.get_vocab_size())
        seconds, counts = await timed(
            [_count_tokens(llm, prompt, batch, f"{batch.number}-{index}") for index, prompt in enumerate(prompts)]
        )
        if counts != [batch.max_tokens] * batch.requests:
            raise WorkNotDone(f"got {counts} tokens, expected {batch.max_tokens} for each request")
        return Timing(tokens=sum(counts), seconds=seconds)

    try:
        facts = {
            "vllm": vllm.__version__,
            "vector_instructions": torch.backends.cpu.get_cpu_capability(),
            "pid": os.getpid(),
        }
        yield Participant(facts, run)
    finally:
        await asyncio.to_thread(llm.shutdown)


async def _count_tokens(llm: Any, prompt: tuple[int, ...], batch: Batch, request_id: str) -> int:
    """Reads one response as it arrives and keeps text and tokens, as `collect` does; returns the number of tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=batch.max_tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    text, token_ids = "", []
    async for part in llm.generate({"prompt_token_ids": list(prompt)}, params, request_id):
        text += part.outputs[0].text
        token_ids.extend(part.outputs[0].token_ids)
    return len(token_ids)


class Watched:
    """An engine that also measures its time to the first token of the last request."""

    def __init__(self, engine: Any) -> None:
        self.first_token = FirstToken()
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Any) -> AsyncGenerator[Any, None]:
        self.first_token = FirstToken()
        return self.first_token.timed(self._engine.submit(request))


@asynccontextmanager
async def our_engine(model: str, dtype: str, compiled: bool) -> AsyncIterator[Participant]:
    """Our engine and our server in the same event loop, as in `steer serve`."""
    from steer_service.engine.engine import VLLMEngine
    from steer_service.server.app import SteerServer
    from steer_service.server.config import ServerConfig

    engine = await VLLMEngine.start(model, **engine_arguments(dtype, compiled))
    server = SteerServer(ServerConfig(address="127.0.0.1:0"))

    watched = Watched(engine)

    async def run(batch: Batch) -> Timing:
        if batch.mode == INSIDE:
            seconds = watched.first_token.seconds
            return Timing(tokens=batch.max_tokens, seconds=seconds, first_token_s=seconds)
        return await run_batch(engine, engine.info, batch)

    try:
        await server.listen()
        await server.open(engine if dtype == STUB else watched)  # type: ignore[arg-type]
        yield Participant({"address": server.address, "pid": os.getpid()}, run)
    finally:
        await server.drain()
        await engine.close()


@asynccontextmanager
async def stub_server(model: str) -> AsyncIterator[Participant]:
    """Our server on the executor without a model; it treats its memory and vLLM's settings as `steer serve` does."""
    from steer_service.engine import start
    from steer_service.server.event_loop import kept_heap

    with kept_heap():
        async with our_engine(model, STUB, compiled=False) as participant:
            start.keep_settings()
            yield participant


@asynccontextmanager
async def fake_server(metrics_port: int, traces_endpoint: str) -> AsyncIterator[Participant]:
    """Our server around the fake backend, whose tokens cost next to nothing; it runs no batch itself.

    With a `traces_endpoint` it also logs each call, to a file that is thrown away.
    """
    from steer_service.server.app import SteerServer
    from steer_service.server.config import ServerConfig
    from steer_service.server.event_loop import kept_heap
    from steer_service.testing.fake_backend import FakeBackend

    async def run(batch: Batch) -> Timing:
        raise WorkNotDone("this server has no client in its process")

    config = ServerConfig(address="127.0.0.1:0", metrics_port=metrics_port, otlp_traces_endpoint=traces_endpoint)
    with kept_heap(), open(os.devnull, "w") as sink:  # noqa: ASYNC230  # before the event loop has work
        if traces_endpoint:
            logging.basicConfig(stream=sink, level=logging.INFO)
        server = SteerServer(config)
        try:
            await server.listen()
            await server.open(FakeBackend())
            yield Participant({"address": server.address, "pid": os.getpid()}, run)
        finally:
            server.stop_now()
            await server.drain()


@asynccontextmanager
async def grpc_client(address: str) -> AsyncIterator[Participant]:
    """Our asynchronous client, connected to the server at `address`."""
    from steer_client import AsyncSteerClient

    async with await AsyncSteerClient.connect(address) as client:

        async def run(batch: Batch) -> Timing:
            return await run_batch(client, client.info, batch)

        yield Participant({"pid": os.getpid()}, run)


@asynccontextmanager
async def peer(kind: str, model: str, dtype: str, compiled: bool) -> AsyncIterator[Participant]:
    """One of vLLM's own servers, and a thin client for it."""
    from bench import peers

    module, client = peers.PEERS[kind]
    async with peers.vllm_server(module, model, **engine_arguments(dtype, compiled)) as server:
        async with client(server) as count_tokens:

            async def run(batch: Batch) -> Timing:
                return await peers.run_peer(count_tokens, batch)

            yield Participant({"pid": server.process.pid}, run)


async def take_part(participant: AbstractAsyncContextManager[Participant], responses: TextIO) -> None:
    """Runs batches until the end of standard input; SIGTERM ends it cleanly at any time."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with participant as ready:
        print(json.dumps(ready.facts), file=responses, flush=True)
        async for batch in _batches():
            timing = await ready.run(batch)
            print(json.dumps(asdict(timing)), file=responses, flush=True)


async def _batches() -> AsyncIterator[Batch]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        yield Batch(**json.loads(line))


def own_stdout() -> TextIO:
    """The original standard output; everything printed afterwards goes to standard error."""
    responses = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # the copy is not inherited by vLLM's processes
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return responses


def _participant(options: argparse.Namespace) -> AbstractAsyncContextManager[Participant]:
    if options.kind == STOCK:
        return stock_vllm(options.where, options.dtype, options.compiled)
    if options.kind == OURS and options.dtype == STUB:
        return stub_server(options.where)
    if options.kind == OURS:
        return our_engine(options.where, options.dtype, options.compiled)
    if options.kind == FAKE:
        port, _, endpoint = options.where.partition(",")
        return fake_server(int(port), endpoint)
    if options.kind == CLIENT:
        return grpc_client(options.where)
    return peer(options.kind, options.where, options.dtype, options.compiled)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.child")
    parser.add_argument("kind", choices=(STOCK, OURS, FAKE, CLIENT, HTTP, VLLM_GRPC))
    parser.add_argument(
        "where", help="the model's folder, a client's server, or PORT,ENDPOINT of a fake's metrics and traces"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    responses = own_stdout()
    # Engines run in the event loop of `steer serve`, as do vLLM's servers; clients run in Python's own.
    loop_factory = new_event_loop if options.kind in (STOCK, OURS, FAKE) else None
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(take_part(_participant(options), responses))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
