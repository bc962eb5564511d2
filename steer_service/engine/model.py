"""The engine for scripts and notebooks: constructed like a model, usable from any loop and from none."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from steer_service.core.backend import ModelInfo
from steer_service.core.events import Event
from steer_service.core.request import GenerateRequest
from steer_service.engine.engine import VLLMEngine
from steer_service.runtime.calls import Messages, SteeringCalls
from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.runtime.handle import CaptureHandle


class VLLMSteeringModel(SteeringCalls):
    """A model on vLLM in this process, with the calls of `steer_client` and synchronous twins.

    It takes every engine argument of vLLM; see `VLLMEngine.start` for what it raises. The engine lives in a thread
    of its own, so that calls from different event loops, one after another, work.
    """

    def __init__(self, model: str, **engine_arguments: Any) -> None:
        self._thread = EventLoopThread("steerllm-engine")
        try:
            self._engine = self._thread.run(VLLMEngine.start(model, **engine_arguments))
        except BaseException:
            self._thread.stop()
            raise

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self._engine.info

    @property
    def is_alive(self) -> bool:
        """False once one of vLLM's processes has died."""
        return self._engine.is_alive

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Answers one request with events; see `core.backend.Backend.submit`."""
        async with aclosing(self._thread.relay(self._engine.submit(request))) as events:
            async for event in events:
                yield event

    def generate_sync(
        self, prompts: Sequence[Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Any], list[CaptureHandle] | None]:
        """`generate` for callers that are not asynchronous; its handles hold fetched captures."""
        return self._run(self._engine.generate(prompts, *args, **kwargs))

    def chat_sync(self, messages: Messages, *args: Any, **kwargs: Any) -> tuple[list[Any], list[CaptureHandle] | None]:
        """`chat` for callers that are not asynchronous; its handles hold fetched captures."""
        return self._run(self._engine.chat(messages, *args, **kwargs))

    def _run(
        self, call: Coroutine[Any, Any, tuple[list[Any], list[CaptureHandle] | None]]
    ) -> tuple[list[Any], list[CaptureHandle] | None]:
        async def run() -> tuple[list[Any], list[CaptureHandle] | None]:
            results, handles = await call
            for handle in handles or ():
                await handle.fetch()
                await handle.close()  # what was fetched stays
            return results, handles

        return self._thread.run(run())

    async def close(self) -> None:
        """Stops vLLM and its processes; calling it again does nothing."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """`close` for callers that are not asynchronous."""
        if not self._thread.is_stopped:
            self._thread.run(self._engine.close())
            self._thread.stop()

    def __enter__(self) -> "VLLMSteeringModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close_sync()
