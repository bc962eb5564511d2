"""The client for synchronous programs: the same calls, run in an event loop in a thread of its own."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from steer_client.aio import AsyncSteerClient
from steer_client.channel import ClientOptions
from steer_service.core.arrays import Float32Array, HiddenArray
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CapturedRows, Captures, MessageBoundary, Pooling, TorchCaptures
from steer_service.core.events import Event
from steer_service.core.positions import Positions
from steer_service.core.prompt import Prompt
from steer_service.core.prompt_tokens import PromptTokens
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
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
from steer_service.runtime.handle import CaptureHandle, Framework, NumpyFramework, fetch_all
from steer_service.runtime.results import ChatResponses, Generations, Texts
from steer_service.runtime.scoring import Answer, AnswerScore
from steer_service.runtime.stream_events import OutputCaptured, StreamEvent
from steer_service.runtime.tokenizer_calls import RenderKeywords
from steer_service.wire.channels import DEFAULT_ADDRESS


class SyncCaptureHandle:
    """The captured hidden states of one output: `fetch` gets the data, `with` closes the handle."""

    def __init__(self, handle: CaptureHandle, loop: EventLoopThread) -> None:
        self._handle = handle
        self._loop = loop
        self._fetched = False

    @property
    def request_id(self) -> str:
        """Id of the request that was captured."""
        return self._handle.request_id

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Layers captured, in the order asked for."""
        return self._handle.layer_indices

    @property
    def message_boundaries(self) -> tuple[MessageBoundary, ...] | None:
        """The tokens of each message of a chat; None if the prompt was not a chat."""
        return self._handle.message_boundaries

    @property
    def boundaries_missing_reason(self) -> str:
        """Why the tokens of each message of a chat are not known, a sentence; "" if they are."""
        return self._handle.boundaries_missing_reason

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self._handle.total_bytes

    @property
    def pooling(self) -> Pooling:
        """Whether there is one row for all positions."""
        return self._handle.pooling

    @overload
    def fetch(self, *, framework: NumpyFramework = "numpy", progress: Progress | None = None) -> Captures: ...

    @overload
    def fetch(self, *, framework: Literal["torch"], progress: Progress | None = None) -> TorchCaptures: ...

    @overload
    def fetch(self, *, framework: Framework, progress: Progress | None = None) -> Captures | TorchCaptures: ...

    def fetch(self, *, framework: Framework = "numpy", progress: Progress | None = None) -> Captures | TorchCaptures:
        """Fetches the data once and returns it; later calls return the same rows. See CaptureHandle.fetch."""
        captures = self._loop.run(self._handle.fetch(framework=framework, progress=progress))
        self._fetched = True
        return captures

    def fetch_rows(
        self,
        *,
        layers: Iterable[int] | None = None,
        positions: Positions | None = None,
        framework: NumpyFramework = "numpy",
        progress: Progress | None = None,
    ) -> CapturedRows:
        """The rows of chosen layers and positions, with their labels; see CaptureHandle.fetch_rows."""
        return self._loop.run(
            self._handle.fetch_rows(layers=layers, positions=positions, framework=framework, progress=progress)
        )

    def matrix(self, layer: int) -> Float32Array:
        """The rows of one layer as float32, shape [rows, hidden_size]; see CaptureHandle.matrix."""
        _ = self.captures  # raises, and names the call, if nothing was fetched
        return self._handle.matrix(layer)

    @property
    def captures(self) -> Captures:
        """`captures[layer][0]["hidden"]`, shape [rows, hidden_size], and more; raises RuntimeError before `fetch`."""
        if not self._fetched:
            raise RuntimeError(f"Captures not fetched yet for request {self.request_id}. Call: handle.fetch()")
        return self._handle.captures

    def get_message_activations(
        self, message_idx: int, layer_idx: int, *, include_generated: bool = False
    ) -> HiddenArray:
        """Rows of one chat message at one layer, shape [rows, hidden_size]; see CaptureHandle."""
        _ = self.captures  # raises, and names the call, if nothing was fetched
        return self._handle.get_message_activations(message_idx, layer_idx, include_generated=include_generated)

    def close(self) -> None:
        """Releases the captures; data already fetched stays. Calling it again does nothing."""
        if self._loop.is_stopped:
            self._handle.mark_closed()  # a closed client has released everything
        else:
            self._loop.run(self._handle.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SteerClient:
    """A model served by `steer serve`, for programs without an event loop; may be used from several threads.

    Its options are those of AsyncSteerClient.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        **options: Unpack[ClientOptions],
    ) -> None:
        self._client = AsyncSteerClient(address, **options)
        self._loop = EventLoopThread("steer-client")

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

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        **options: Unpack[GenerateKeywords],
    ) -> Texts[SyncCaptureHandle] | Generations[SyncCaptureHandle]:
        """Generates from all prompts concurrently; returns one text per output. See AsyncSteerClient.generate."""
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

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[SyncCaptureHandle] | Generations[SyncCaptureHandle]:
        """Generates the next turn of each conversation; returns one ChatResponse per output: see AsyncSteerClient."""
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

    def score(
        self,
        prompts: Prompts,
        answers: Sequence[Answer],
        **options: Unpack[ScoreKeywords],
    ) -> list[AnswerScore]:
        """How likely each of `answers` is after its prompt; see AsyncSteerClient.score."""
        scores = self._client.score(prompts, answers, **options)
        return self._loop.run(scores)

    def tokenize(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        model: str = "",
    ) -> PromptTokens:
        """The tokens of a text; see AsyncSteerClient.tokenize."""
        tokens = self._client.tokenize(
            text,
            add_special_tokens=add_special_tokens,
            with_token_texts=with_token_texts,
            with_offsets=with_offsets,
            model=model,
        )
        return self._loop.run(tokens)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, model: str = "") -> str:
        """The text of tokens; see AsyncSteerClient.detokenize."""
        return self._loop.run(self._client.detokenize(token_ids, skip_special_tokens=skip_special_tokens, model=model))

    def render(
        self,
        prompt: str | Prompt | Sequence[int] | Messages,
        *,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        truncate_prompt_tokens: int | None = None,
        model: str = "",
        **options: Unpack[RenderKeywords],
    ) -> PromptTokens:
        """A prompt as the model gets it; see AsyncSteerClient.render."""
        tokens = self._client.render(
            prompt,
            with_token_texts=with_token_texts,
            with_offsets=with_offsets,
            truncate_prompt_tokens=truncate_prompt_tokens,
            model=model,
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
    ) -> list[Captures]: ...

    @overload
    def fetch_all(
        self, handles: Sequence[SyncCaptureHandle], *, framework: Literal["torch"], progress: Progress | None = None
    ) -> list[TorchCaptures]: ...

    @overload
    def fetch_all(
        self, handles: Sequence[SyncCaptureHandle], *, framework: Framework, progress: Progress | None = None
    ) -> list[Captures] | list[TorchCaptures]: ...

    def fetch_all(
        self, handles: Sequence[SyncCaptureHandle], *, framework: Framework = "numpy", progress: Progress | None = None
    ) -> list[Captures] | list[TorchCaptures]:
        """Fetches several handles, a few at a time; `progress` is called with the sums of their bytes."""
        captures = self._loop.run(
            fetch_all([handle._handle for handle in handles], framework=framework, progress=progress)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sync(self, handles: list[CaptureHandle] | None) -> list[SyncCaptureHandle] | None:
        return None if handles is None else [SyncCaptureHandle(handle, self._loop) for handle in handles]
