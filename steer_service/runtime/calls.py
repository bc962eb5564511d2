"""The calls that users know from steerllm: generate, chat and stream, over any backend's `submit`."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, SteerError, within
from steer_service.core.events import Event, Started, TokenDelta
from steer_service.core.field_checks import check_layer, is_integer
from steer_service.core.json_fields import JsonObject
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt, only_for_text, prompt_from
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingKeywords, SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.conversations import Messages, conversation_from, conversations_from
from steer_service.runtime.handle import CaptureHandle, all_or_none
from steer_service.runtime.response_validator import ResponseValidator
from steer_service.runtime.results import (
    ChatResponse,
    ChatResponses,
    Generation,
    Generations,
    Texts,
    collect,
    handle_of,
)
from steer_service.runtime.scoring import Answer, AnswerScore, AnswerScorer
from steer_service.runtime.second_bos import warn_of_second_bos


class GenerateKeywords(SamplingKeywords, total=False):
    """Keywords of `generate` and `stream`: the fields of SamplingOptions, and of TextPrompt."""

    add_special_tokens: bool | None


class ChatKeywords(SamplingKeywords, total=False):
    """Keywords of `chat`: the fields of SamplingOptions, and of ChatPrompt; see there for their meaning."""

    add_generation_prompt: bool | None
    chat_template_kwargs: JsonObject | None
    tools: Sequence[JsonObject] | None


class SteeringCalls(ABC):
    """The calls of every backend; a subclass adds `info`, `submit` and `close`."""

    @property
    @abstractmethod
    def info(self) -> ModelInfo:
        """Facts about the model."""

    @abstractmethod
    def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of one request; see `core.backend.Backend.submit`."""

    @abstractmethod
    async def close(self) -> None:
        """Ends all requests and frees everything; calling it again does nothing."""

    async def load_info(self) -> ModelInfo:
        """`info`, without blocking the event loop where it has to be fetched first."""
        return self.info

    @property
    def is_alive(self) -> bool:
        """False once the backend cannot recover."""
        return True

    @property
    def requests_at_once(self) -> int:
        """Requests that it computes at once, while others wait; 0 if it has no such limit."""
        return 0

    @property
    def has_priority(self) -> bool:
        """True if requests may have a priority."""
        return False

    @property
    def hidden_size(self) -> int:
        """Elements of one position of the residual stream."""
        return self.info.hidden_size

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return self.info.layer_count

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.info.name

    @overload
    async def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt | Sequence[int]],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        raw_output: Literal[False] = False,
        **sampling_options: Unpack[GenerateKeywords],
    ) -> Texts[CaptureHandle]: ...

    @overload
    async def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt | Sequence[int]],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        raw_output: Literal[True],
        **sampling_options: Unpack[GenerateKeywords],
    ) -> Generations[CaptureHandle]: ...

    @overload
    async def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt | Sequence[int]],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        raw_output: bool,
        **sampling_options: Unpack[GenerateKeywords],
    ) -> Texts[CaptureHandle] | Generations[CaptureHandle]: ...

    async def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt | Sequence[int]],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        raw_output: bool = False,
        **sampling_options: Unpack[GenerateKeywords],
    ) -> Texts[CaptureHandle] | Generations[CaptureHandle]:
        """Generates from all prompts concurrently; returns one text per output, in the order of the prompts.

        `sampling_options` are the fields of SamplingOptions, which may be given whole as `sampling` instead;
        `max_tokens` defaults to 256, `temperature` to 1, unless the server has other defaults.
        `add_special_tokens=False` is for texts that have their BOS token already. `steering_spec` and `capture_layers`
        apply to every prompt of the call. `capture_dtype` is the dtype in which rows travel, the model's or "float32".
        A whole `capture` in place of both also chooses positions and site. With n > 1 a prompt gives n texts and n
        handles. `time_budget_s` ends each prompt's generation after so many seconds and keeps what was generated.
        `model` is the name of the model or of an adapter; only requests of the same `cache_salt` share prefixes.
        `raw_output=True` returns one Generation per prompt in place of the texts.
        Raises a SteerError; on an error the other prompts of the call are aborted.
        """
        add_special_tokens = sampling_options.pop("add_special_tokens", None)
        options = _sampling_from(sampling, sampling_options)
        spec = await self._capture_from(capture_layers, capture_dtype, capture)
        requests = [
            GenerateRequest(
                prompt=prompt,
                sampling=options,
                steering=steering_spec,
                capture=spec,
                time_budget_s=time_budget_s,
                model=model,
                cache_salt=cache_salt,
            )
            for prompt in _prompts_from(prompts, add_special_tokens)
        ]
        results = await self._generate_all(requests, has_capture=spec is not None)
        if raw_output:
            return results
        texts = [output.text for generation in results.generations for output in generation.outputs]
        return Texts(texts, results.handles)

    @overload
    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        continue_final_message: bool = False,
        raw_output: Literal[False] = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle]: ...

    @overload
    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        continue_final_message: bool = False,
        raw_output: Literal[True],
        **options: Unpack[ChatKeywords],
    ) -> Generations[CaptureHandle]: ...

    @overload
    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        continue_final_message: bool = False,
        raw_output: bool,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle] | Generations[CaptureHandle]: ...

    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        capture_layers: int | Sequence[int] | None = None,
        capture_dtype: str | None = None,
        capture: CaptureSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        continue_final_message: bool = False,
        raw_output: bool = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle] | Generations[CaptureHandle]:
        """Generates the next turn of one conversation or of several; returns one ChatResponse per output.

        With `continue_final_message` the model continues the last message, which must be an assistant's; it becomes
        the response's `prefill`. `add_generation_prompt=False` leaves out the header of the model's turn.
        `chat_template_kwargs` and `tools` go to the chat template. Everything else is as for `generate`.
        """
        of_chat = _chat_options_from(options)
        chosen = _sampling_from(sampling, options)
        spec = await self._capture_from(capture_layers, capture_dtype, capture)
        conversations = [conversation_from(one) for one in conversations_from(messages)]
        prompts = [
            ChatPrompt(messages=conversation, continue_final_message=continue_final_message, **of_chat)
            for conversation in conversations
        ]
        requests = [
            GenerateRequest(
                prompt=prompt,
                sampling=chosen,
                steering=steering_spec,
                capture=spec,
                time_budget_s=time_budget_s,
                model=model,
                cache_salt=cache_salt,
            )
            for prompt in prompts
        ]
        results = await self._generate_all(requests, has_capture=spec is not None)
        if raw_output:
            return results
        responses = [
            ChatResponse(conversation[-1].content if continue_final_message else "", output.text)
            for conversation, generation in zip(conversations, results.generations, strict=True)
            for output in generation.outputs
        ]
        return ChatResponses(responses, results.handles)

    async def stream(
        self,
        prompt: str | Prompt | Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        steering_spec: SteeringSpec | None = None,
        time_budget_s: float | None = None,
        model: str = "",
        cache_salt: str = "",
        **sampling_options: Unpack[GenerateKeywords],
    ) -> AsyncGenerator[str, None]:
        """Yields the text of one output as it is generated; closing the iterator aborts the request."""
        add_special_tokens = sampling_options.pop("add_special_tokens", None)
        options = _sampling_from(sampling, sampling_options)
        if options.n not in (None, 1):
            raise InvalidRequest("stream yields one output; call generate or submit for more", field="n")
        request = GenerateRequest(
            prompt=_prompt_from(prompt, add_special_tokens),
            sampling=options,
            steering=steering_spec,
            time_budget_s=time_budget_s,
            model=model,
            cache_salt=cache_salt,
        )
        async with aclosing(checked_events(self, request)) as events:
            async for event in events:
                if isinstance(event, TokenDelta) and event.text:
                    yield event.text

    async def score(
        self,
        prompts: str | Prompt | Sequence[str | Prompt | Sequence[int]],
        answers: Sequence[Answer],
        *,
        steering_spec: SteeringSpec | None = None,
        add_special_tokens: bool | None = None,
    ) -> list[AnswerScore]:
        """How likely each of `answers` is after its prompt, under `steering_spec`; one request for each answer.

        One prompt, or one for each answer. An answer is text, whose tokens must follow those of the prompt, or token
        ids. Positions of the steering are those that it has when the model generates the answer.
        `add_special_tokens` is for text prompts, as in `generate`. Raises a SteerError.
        """
        given = _prompts_from(prompts, add_special_tokens)
        if isinstance(answers, (str, bytes, Mapping)) or not isinstance(answers, Sequence):
            raise InvalidRequest(f"answers are a list, got {type(answers).__name__}", field="answers")
        if len(given) not in (1, len(answers)):
            raise InvalidRequest(f"{len(given)} prompts for {len(answers)} answers", field="answers")
        paired = given * len(answers) if len(given) == 1 else given
        return await AnswerScorer(self.complete, paired, answers).score(steering_spec)

    async def complete(self, request: GenerateRequest) -> Generation:
        """Runs one request to its end; raises EngineFailed if the response contradicts it. See `submit`."""
        return await collect(checked_events(self, request))

    async def _capture_from(
        self, layers: int | Sequence[int] | None, dtype: str | None, capture: CaptureSpec | None
    ) -> CaptureSpec | None:
        try:
            return _capture_from(layers, dtype, capture)
        except InvalidRequest as error:
            if error.reason == "UNKNOWN_LAYER":
                await self._check_layers(layers)
            raise

    async def _check_layers(self, layers: Any) -> None:
        """Raises InvalidRequest for a layer that the model lacks, with its numbers; nothing if they are not known."""
        try:
            last = (await self.load_info()).layer_count - 1
        except SteerError:
            return
        for index, layer in enumerate([layers] if is_integer(layers) else layers):
            with within(f"capture.layers[{index}]"):
                check_layer(layer, last)

    async def _generate_all(
        self, requests: Sequence[GenerateRequest], *, has_capture: bool
    ) -> Generations[CaptureHandle]:
        generations: list[Generation] = []

        async def one(request: GenerateRequest) -> Generation:
            generation = await self.complete(request)
            generations.append(generation)
            return generation

        try:
            generations = await all_or_none(one(request) for request in requests)
        except BaseException:
            for generation in generations:
                generation.release_nowait()
            raise
        handles = None
        if has_capture:
            handles = [
                handle_of(generation, output, is_chat=isinstance(request.prompt, ChatPrompt))
                for request, generation in zip(requests, generations, strict=True)
                for output in generation.outputs
            ]
        return Generations(generations, handles)


async def checked_events(backend: SteeringCalls, request: GenerateRequest) -> AsyncGenerator[Event, None]:
    """The events of `backend.submit(request)`; raises EngineFailed at the first that contradicts the request."""
    validator = ResponseValidator(request)
    prompt = request.prompt
    async with aclosing(backend.submit(request)) as events:
        async for event in events:
            validator.check(event)
            if isinstance(event, Started) and isinstance(prompt, TextPrompt):
                warn_of_second_bos(prompt, event.prompt_token_ids)
            yield event


def _chat_options_from(keywords: ChatKeywords) -> dict[str, Any]:
    """Takes the fields of ChatPrompt out of `keywords`."""
    return {
        "add_generation_prompt": keywords.pop("add_generation_prompt", None),
        "chat_template_kwargs": keywords.pop("chat_template_kwargs", None) or {},
        "tools": keywords.pop("tools", None) or (),
    }


def _sampling_from(sampling: SamplingOptions | None, keywords: SamplingKeywords) -> SamplingOptions:
    max_tokens, temperature = keywords.pop("max_tokens", None), keywords.pop("temperature", None)
    if sampling is None:
        unknown = set(keywords) - set(SamplingOptions.__dataclass_fields__)
        if unknown:
            raise InvalidRequest(
                f"{', '.join(sorted(unknown))} is not a sampling option; there are "
                f"{', '.join(SamplingOptions.__dataclass_fields__)}",
                field="sampling",
            )
        keywords["max_tokens"], keywords["temperature"] = max_tokens, temperature
        return SamplingOptions(**keywords)  # type: ignore[arg-type]  # it takes any sequences, and None for them
    if keywords or max_tokens is not None or temperature is not None:
        raise InvalidRequest("Provide either sampling or sampling keyword overrides, not both.", field="sampling")
    if not isinstance(sampling, SamplingOptions):
        raise InvalidRequest(f"expected SamplingOptions, got {type(sampling).__name__}", field="sampling")
    return sampling


def _capture_from(
    layers: int | Sequence[int] | None, dtype: str | None, capture: CaptureSpec | None
) -> CaptureSpec | None:
    if dtype is not None and layers is None:
        raise InvalidRequest("it goes with capture_layers; a whole capture has its own dtype", field="capture_dtype")
    if layers is None:
        if not isinstance(capture, CaptureSpec | None):
            raise InvalidRequest(f"expected CaptureSpec, got {type(capture).__name__}", field="capture")
        return capture
    if capture is not None:
        raise InvalidRequest("Provide either capture_layers or a whole capture, not both.", field="capture")
    with within("capture"):
        return CaptureSpec(layers=layers, dtype=dtype)  # type: ignore[arg-type]  # it takes one layer or any sequence


def _prompts_from(prompts: Any, add_special_tokens: bool | None) -> list[Prompt]:
    if isinstance(prompts, (str, TextPrompt, TokenPrompt, ChatPrompt)):
        return [_prompt_from(prompts, add_special_tokens)]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts are a text or a list, got {type(prompts).__name__}", field="prompt")
    return [_prompt_from(prompt, add_special_tokens) for prompt in prompts]


def _prompt_from(value: Any, add_special_tokens: bool | None) -> Prompt:
    with within("prompt"):
        prompt = prompt_from(value)
        if add_special_tokens is None:
            return prompt
        if not isinstance(prompt, TextPrompt):
            raise only_for_text()
        return replace(prompt, add_special_tokens=add_special_tokens)
