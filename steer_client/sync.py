"""The client for synchronous programs: the same calls, run in an event loop in a thread of its own."""

from collections.abc import Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from steer_client.aio import AsyncSteerClient
from steer_client.channel import ClientOptions
from steer_client.readiness import READY_TIMEOUT_S
from steer_client.sync_handles import SyncCaptureHandle
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import Captures, TorchCaptures
from steer_service.core.errors import SteerError
from steer_service.core.events import Event
from steer_service.core.prompt import Prompt
from steer_service.core.prompt_tokens import PromptTokens
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.server_info import ServerInfo
from steer_service.core.stored_capture import Progress
from steer_service.runtime.call_options import (
    ChatKeywords,
    GenerateKeywords,
    Prompts,
    Sampling,
    ScoreKeywords,
    StreamEventsKeywords,
    StreamKeywords,
)
from steer_service.runtime.conversations import Messages
from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.runtime.handle import CaptureHandle, Framework, NumpyFramework, check_handles, fetch_all
from steer_service.runtime.process_bound import ProcessBound
from steer_service.runtime.results import ChatResponses, Generations, PartialGenerations, Texts, check_partial
from steer_service.runtime.scoring import Answer, AnswerScore
from steer_service.runtime.stream_events import OutputCaptured, StreamEvent
from steer_service.runtime.tokenizer_calls import RenderKeywords
from steer_service.wire.channels import DEFAULT_ADDRESS


class SteerClient(ProcessBound):
    """A model served by `steer serve`, for programs without an event loop; may be used from several threads.

    Its options are those of AsyncSteerClient.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        **options: Unpack[ClientOptions],
    ) -> None:
        self._client = AsyncSteerClient(address, **options)
        self._loop = EventLoopThread("steer-client", finish=self._client.close, owner="the client")

    @property
    def address(self) -> str:
        """The address of the server."""
        return self._client.address

    @property
    def info(self) -> ModelInfo:
        """Facts about the model; the first use blocks until the server responds."""
        return self._client.info

    @property
    def hidden_size(self) -> int:
        """Elements of one position of the residual stream."""
        return self._client.hidden_size

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return self._client.layer_count

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self._client.model_name

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Facts about the server; see AsyncSteerClient.server_info."""
        return self._loop.run(self._client.server_info(timeout_s=timeout_s))

    def wait_until_ready(self, *, timeout_s: float = READY_TIMEOUT_S) -> ModelInfo:
        """Waits until the server serves its model; see AsyncSteerClient.wait_until_ready."""
        return self._loop.run(self._client.wait_until_ready(timeout_s=timeout_s))

    @overload
    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[False] = False,
        **options: Unpack[GenerateKeywords],
    ) -> Texts[SyncCaptureHandle]: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        **options: Unpack[GenerateKeywords],
    ) -> Generations[SyncCaptureHandle]: ...

    @overload
    def generate(
        self, prompts: Prompts, sampling: Sampling = None, *, raw_output: bool, **options: Unpack[GenerateKeywords]
    ) -> Texts[SyncCaptureHandle] | Generations[SyncCaptureHandle]: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        return_exceptions: bool,
        **options: Unpack[GenerateKeywords],
    ) -> PartialGenerations[SyncCaptureHandle]: ...

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[GenerateKeywords],
    ) -> Texts[SyncCaptureHandle] | Generations[SyncCaptureHandle] | PartialGenerations[SyncCaptureHandle]:
        """Generates from all prompts concurrently; returns one text per output. See AsyncSteerClient.generate."""
        check_partial(return_exceptions=return_exceptions, raw_output=raw_output)
        if return_exceptions:
            call = self._client.generate(prompts, sampling, raw_output=True, return_exceptions=True, **options)
            return self._partial(self._loop.run(call))
        result = self._loop.run(self._client.generate(prompts, sampling, raw_output=raw_output, **options))
        handles = self._sync(result.handles)
        if isinstance(result, Generations):
            return Generations(result.generations, handles)
        return Texts(result.texts, handles)

    @overload
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[False] = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[SyncCaptureHandle]: ...

    @overload
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        **options: Unpack[ChatKeywords],
    ) -> Generations[SyncCaptureHandle]: ...

    @overload
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: bool,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[SyncCaptureHandle] | Generations[SyncCaptureHandle]: ...

    @overload
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        return_exceptions: bool,
        **options: Unpack[ChatKeywords],
    ) -> PartialGenerations[SyncCaptureHandle]: ...

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[SyncCaptureHandle] | Generations[SyncCaptureHandle] | PartialGenerations[SyncCaptureHandle]:
        """Generates the next turn of each conversation; returns one ChatResponse per output: see AsyncSteerClient."""
        check_partial(return_exceptions=return_exceptions, raw_output=raw_output)
        if return_exceptions:
            call = self._client.chat(messages, sampling, raw_output=True, return_exceptions=True, **options)
            return self._partial(self._loop.run(call))
        result = self._loop.run(self._client.chat(messages, sampling, raw_output=raw_output, **options))
        handles = self._sync(result.handles)
        if isinstance(result, Generations):
            return Generations(result.generations, handles)
        return ChatResponses(result.responses, handles)

    def stream(
        self,
        prompt: str | Prompt | Sequence[int],
        sampling: SamplingOptions | None = None,
        **options: Unpack[StreamKeywords],
    ) -> Generator[str, None, None]:
        """Yields the text of one output as it is generated; closing the iterator aborts the request."""
        return self._loop.iterate(self._client.stream(prompt, sampling, **options))

    def stream_events(
        self,
        prompt: str | Prompt | Sequence[int],
        sampling: SamplingOptions | None = None,
        **options: Unpack[StreamEventsKeywords],
    ) -> Generator[StreamEvent[SyncCaptureHandle], None, None]:
        """Yields everything that happens to one request, captures as handles: see AsyncSteerClient.stream_events."""
        with closing(self._loop.iterate(self._client.stream_events(prompt, sampling, **options))) as events:
            for event in events:
                if isinstance(event, OutputCaptured):
                    handle = SyncCaptureHandle(event.handle, self._loop)
                    yield OutputCaptured(output_index=event.output_index, handle=handle)
                else:
                    yield event

    @overload
    def score(
        self, prompts: Prompts, answers: Sequence[Answer], **options: Unpack[ScoreKeywords]
    ) -> list[AnswerScore]: ...

    @overload
    def score(
        self,
        prompts: Prompts,
        answers: Sequence[Answer],
        *,
        return_exceptions: bool,
        **options: Unpack[ScoreKeywords],
    ) -> list[AnswerScore | SteerError]: ...

    def score(
        self,
        prompts: Prompts,
        answers: Sequence[Answer],
        *,
        return_exceptions: bool = False,
        **options: Unpack[ScoreKeywords],
    ) -> list[AnswerScore] | list[AnswerScore | SteerError]:
        """How likely each of `answers` is after its prompt; see AsyncSteerClient.score."""
        if return_exceptions:
            return self._loop.run(self._client.score(prompts, answers, return_exceptions=True, **options))
        return self._loop.run(self._client.score(prompts, answers, **options))

    def tokenize(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        model: str = "",
        timeout_s: float | None = None,
    ) -> PromptTokens:
        """The tokens of a text; see AsyncSteerClient.tokenize."""
        tokens = self._client.tokenize(
            text,
            add_special_tokens=add_special_tokens,
            with_token_texts=with_token_texts,
            with_offsets=with_offsets,
            model=model,
            timeout_s=timeout_s,
        )
        return self._loop.run(tokens)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        model: str = "",
        timeout_s: float | None = None,
    ) -> str:
        """The text of tokens; see AsyncSteerClient.detokenize."""
        return self._loop.run(
            self._client.detokenize(
                token_ids, skip_special_tokens=skip_special_tokens, model=model, timeout_s=timeout_s
            )
        )

    def render(
        self,
        prompt: str | Prompt | Sequence[int] | Messages,
        *,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        truncate_prompt_tokens: int | None = None,
        model: str = "",
        timeout_s: float | None = None,
        **options: Unpack[RenderKeywords],
    ) -> PromptTokens:
        """A prompt as the model gets it; see AsyncSteerClient.render."""
        tokens = self._client.render(
            prompt,
            with_token_texts=with_token_texts,
            with_offsets=with_offsets,
            truncate_prompt_tokens=truncate_prompt_tokens,
            model=model,
            timeout_s=timeout_s,
            **options,
        )
        return self._loop.run(tokens)

    @overload
    def fetch_all(
        self,
        handles: Sequence[SyncCaptureHandle],
        *,
        framework: NumpyFramework = "numpy",
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> list[Captures]: ...

    @overload
    def fetch_all(
        self,
        handles: Sequence[SyncCaptureHandle],
        *,
        framework: Literal["torch"],
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> list[TorchCaptures]: ...

    @overload
    def fetch_all(
        self,
        handles: Sequence[SyncCaptureHandle],
        *,
        framework: Framework,
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> list[Captures] | list[TorchCaptures]: ...

    def fetch_all(
        self,
        handles: Sequence[SyncCaptureHandle],
        *,
        framework: Framework = "numpy",
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> list[Captures] | list[TorchCaptures]:
        """Fetches several handles, a few at a time; `progress` is called with the sums of their bytes.

        Raises InvalidRequest for None, which is in the place of the handle of a prompt that failed.
        """
        check_handles(handles)
        captures = self._loop.run(
            fetch_all(
                [handle._handle for handle in handles], framework=framework, progress=progress, timeout_s=timeout_s
            )
        )
        for handle in handles:
            handle._fetched = True
        return captures

    def submit(self, request: GenerateRequest) -> Generator[Event, None, None]:
        """Yields the events of one request; closing the iterator cancels the request on the server."""
        return self._loop.iterate(self._client.submit(request))

    def close(self) -> None:
        """Cancels running calls and closes the connection; calling it again does nothing."""
        if not self._loop.is_stopped:
            self._loop.run(self._client.close())
            self._loop.stop()

    def __repr__(self) -> str:
        return f"SteerClient({self._client._shown})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sync(self, handles: list[CaptureHandle] | None) -> list[SyncCaptureHandle] | None:
        return None if handles is None else [SyncCaptureHandle(handle, self._loop) for handle in handles]

    def _partial(self, result: PartialGenerations[CaptureHandle]) -> PartialGenerations[SyncCaptureHandle]:
        if result.handles is None:
            return PartialGenerations(result.generations, None)
        handles = [None if handle is None else SyncCaptureHandle(handle, self._loop) for handle in result.handles]
        return PartialGenerations(result.generations, handles)
