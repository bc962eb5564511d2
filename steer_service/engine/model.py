"""The engine for scripts and notebooks: constructed like a model, usable from any event loop or without one."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar, Unpack, overload

from steer_service.core.backend import ModelInfo
from steer_service.core.events import Event
from steer_service.core.prompt import Prompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.start_proof import StartProof
from steer_service.core.usage import BackendUsage
from steer_service.engine.engine import VLLMEngine
from steer_service.runtime.call_options import (
    ChatKeywords,
    GenerateKeywords,
    Prompts,
    Sampling,
    ScoreKeywords,
    StreamEventsKeywords,
    StreamKeywords,
)
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.conversations import Messages
from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.results import ChatResponses, Generations, Texts
from steer_service.runtime.scoring import Answer, AnswerScore
from steer_service.runtime.stream_events import OutputCaptured, StreamEvent
from steer_service.runtime.tokenizer_calls import RenderKeywords

Results = TypeVar("Results", bound=Texts[CaptureHandle] | Generations[CaptureHandle] | ChatResponses[CaptureHandle])


class VLLMSteeringModel(SteeringCalls):
    """A model on vLLM in this process, with the calls of `steer_client` and synchronous twins.

    `engine_arguments` are vLLM's own, of every type that vLLM takes, and those of this project: `steer_slots` and
    others that begin with `steer_`, `lora_modules` (name -> folder of an adapter), `chat_template` and
    `default_chat_template_kwargs`. The engine runs in a thread of its own, so calls from several event loops, one
    after another, work.

    Raises InvalidRequest for an unknown argument; Unsupported for an argument that cannot be honoured, or a model whose
    layers are not known; EngineFailed if vLLM does not start.
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

    @property
    def has_priority(self) -> bool:
        """True if requests may have a priority."""
        return self._engine.has_priority

    @property
    def start_proof(self) -> StartProof | None:
        """What the engine proved about itself when it started."""
        return self._engine.start_proof

    @property
    def usage(self) -> BackendUsage:
        """How much of its limits the engine uses now."""
        return self._engine.usage

    @property
    def has_structured_outputs(self) -> bool:
        """True: vLLM has them."""
        return self._engine.has_structured_outputs

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of one request, from Started to Completed; closing the iterator aborts the request."""
        async with aclosing(self._thread.relay(self._engine.submit(request))) as events:
            async for event in events:
                yield event

    @overload
    def generate_sync(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[False] = False,
        **options: Unpack[GenerateKeywords],
    ) -> Texts[CaptureHandle]: ...

    @overload
    def generate_sync(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        **options: Unpack[GenerateKeywords],
    ) -> Generations[CaptureHandle]: ...

    @overload
    def generate_sync(
        self, prompts: Prompts, sampling: Sampling = None, *, raw_output: bool, **options: Unpack[GenerateKeywords]
    ) -> Texts[CaptureHandle] | Generations[CaptureHandle]: ...

    def generate_sync(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        **options: Unpack[GenerateKeywords],
    ) -> Texts[CaptureHandle] | Generations[CaptureHandle]:
        """`generate` for synchronous callers; its handles hold fetched captures."""
        return self._run(self._engine.generate(prompts, sampling, raw_output=raw_output, **options))

    @overload
    def chat_sync(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[False] = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle]: ...

    @overload
    def chat_sync(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        **options: Unpack[ChatKeywords],
    ) -> Generations[CaptureHandle]: ...

    @overload
    def chat_sync(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: bool,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle] | Generations[CaptureHandle]: ...

    def chat_sync(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle] | Generations[CaptureHandle]:
        """`chat` for synchronous callers; its handles hold fetched captures."""
        return self._run(self._engine.chat(messages, sampling, raw_output=raw_output, **options))

    def stream_sync(
        self,
        prompt: str | Prompt | Sequence[int],
        sampling: SamplingOptions | None = None,
        **options: Unpack[StreamKeywords],
    ) -> Generator[str, None, None]:
        """`stream` for synchronous callers."""
        return self._thread.iterate(self._engine.stream(prompt, sampling, **options))

    def stream_events_sync(
        self,
        prompt: str | Prompt | Sequence[int],
        sampling: SamplingOptions | None = None,
        **options: Unpack[StreamEventsKeywords],
    ) -> Generator[StreamEvent[CaptureHandle], None, None]:
        """`stream_events` for synchronous callers; its handles hold fetched captures."""
        return self._thread.iterate(_fetched(self._engine.stream_events(prompt, sampling, **options)))

    def score_sync(
        self,
        prompts: Prompts,
        answers: Sequence[Answer],
        **options: Unpack[ScoreKeywords],
    ) -> list[AnswerScore]:
        """`score` for synchronous callers."""
        scores = self._engine.score(prompts, answers, **options)
        return self._thread.run(scores)

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """The tokens of a prompt, those that `submit` gives to the model; raises the SteerErrors of such a prompt."""
        return await self._thread.call(self._engine.tokens_of(request))

    async def text_of(self, request: DetokenizeRequest) -> str:
        """The text of tokens; raises InvalidRequest for ids that the model does not have, or too many."""
        return await self._thread.call(self._engine.text_of(request))

    def tokenize_sync(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        model: str = "",
    ) -> PromptTokens:
        """`tokenize` for synchronous callers."""
        tokens = self._engine.tokenize(
            text,
            add_special_tokens=add_special_tokens,
            with_token_texts=with_token_texts,
            with_offsets=with_offsets,
            model=model,
        )
        return self._thread.run(tokens)

    def detokenize_sync(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, model: str = "") -> str:
        """`detokenize` for synchronous callers."""
        return self._thread.run(
            self._engine.detokenize(token_ids, skip_special_tokens=skip_special_tokens, model=model)
        )

    def render_sync(
        self,
        prompt: str | Prompt | Sequence[int] | Messages,
        *,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        truncate_prompt_tokens: int | None = None,
        model: str = "",
        **options: Unpack[RenderKeywords],
    ) -> PromptTokens:
        """`render` for synchronous callers."""
        tokens = self._engine.render(
            prompt,
            with_token_texts=with_token_texts,
            with_offsets=with_offsets,
            truncate_prompt_tokens=truncate_prompt_tokens,
            model=model,
            **options,
        )
        return self._thread.run(tokens)

    def _run(self, call: Coroutine[Any, Any, Results]) -> Results:
        async def run() -> Results:
            results = await call
            for handle in results.handles or ():
                await _fetch(handle)
            return results

        return self._thread.run(run())

    async def close(self) -> None:
        """Stops vLLM and its processes; calling it again does nothing."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """`close` for synchronous callers."""
        if not self._thread.is_stopped:
            self._thread.run(self._engine.close())
            self._thread.stop()

    def __enter__(self) -> "VLLMSteeringModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close_sync()


async def _fetched(
    source: AsyncGenerator[StreamEvent[CaptureHandle], None],
) -> AsyncGenerator[StreamEvent[CaptureHandle], None]:
    async with aclosing(source) as events:
        async for event in events:
            if isinstance(event, OutputCaptured):
                await _fetch(event.handle)
            yield event


async def _fetch(handle: CaptureHandle) -> None:
    await handle.fetch()
    await handle.close()  # what was fetched stays
