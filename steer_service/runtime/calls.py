"""The calls that users know from steerllm: generate, chat and stream, over any backend's `submit`."""

from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, SteerError, within
from steer_service.core.events import Event, Started, TokenDelta
from steer_service.core.field_checks import check_layer, is_integer
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.backend_facts import BackendFacts
from steer_service.runtime.call_options import (
    ChatKeywords,
    GenerateKeywords,
    ManyKeywords,
    Prompts,
    Sampling,
    ScoreKeywords,
    StreamEventsKeywords,
    StreamKeywords,
    capture_from,
    check_known,
    is_one_prompt,
    one_prompt_from,
    prompts_from,
    requests_from,
)
from steer_service.runtime.conversations import Messages, conversation_from, conversations_from, is_one_conversation
from steer_service.runtime.deadline import until_deadline
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.many_prompts import ManyOptions, run_many
from steer_service.runtime.response_validator import ResponseValidator
from steer_service.runtime.results import (
    ChatResponse,
    ChatResponses,
    Generation,
    Generations,
    PartialGenerations,
    Texts,
    check_partial,
    collect,
    complete_of,
    handles_of,
)
from steer_service.runtime.scoring import SCORED_WITH, Answer, AnswerScore, AnswerScorer
from steer_service.runtime.second_bos import warn_of_second_bos
from steer_service.runtime.stream_events import StreamEvent, with_handles
from steer_service.runtime.tokenizer_calls import TokenizerCalls

COLLECTED_INTERVAL = 64
"""Tokens of a piece where a call returns the whole output: sending each costs the server three times as much.

Not all of them in one piece: a fault, or a row that is not finite, ends the request when a piece is made.
"""


class SteeringCalls(BackendFacts, TokenizerCalls):
    """The calls of every backend; a subclass adds `info`, `submit`, `close`, `tokens_of` and `text_of`."""

    @abstractmethod
    def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of one request, from Started to Completed; closing the iterator aborts the request."""

    def submit_within(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        """`submit` for a caller that waits at most `timeout_s`; a backend with someone to tell overrides it."""
        return self.submit(request)

    @abstractmethod
    async def close(self) -> None:
        """Ends all requests and frees everything; calling it again does nothing."""

    async def load_info(self) -> ModelInfo:
        """`info`, without blocking the event loop where it has to be fetched first."""
        return self.info

    @overload
    async def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[False] = False,
        **options: Unpack[GenerateKeywords],
    ) -> Texts[CaptureHandle]: ...

    @overload
    async def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        **options: Unpack[GenerateKeywords],
    ) -> Generations[CaptureHandle]: ...

    @overload
    async def generate(
        self, prompts: Prompts, sampling: Sampling = None, *, raw_output: bool, **options: Unpack[GenerateKeywords]
    ) -> Texts[CaptureHandle] | Generations[CaptureHandle]: ...

    @overload
    async def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        return_exceptions: bool,
        **options: Unpack[GenerateKeywords],
    ) -> PartialGenerations[CaptureHandle]: ...

    async def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[GenerateKeywords],
    ) -> Texts[CaptureHandle] | Generations[CaptureHandle] | PartialGenerations[CaptureHandle]:
        """Generates from all prompts concurrently; returns one text per output, in the order of the prompts.

        * **Sampling**: the fields of SamplingOptions are keywords, or `sampling` has them whole. `max_tokens` defaults
          to 256 and `temperature` to 1, unless the server has other defaults. With n > 1 a prompt gives n texts.
        * **Steering**: `steering_spec` is a SteeringSpec.
        * **Captures**: `capture_layers`, `capture_dtype` (the model's or "float32") and `capture_pooling` ("mean",
          "last" or "max") choose what is captured. A whole `capture` in place of them also chooses positions and site.
          There is one handle for each text.
        * **Prompts**: `add_special_tokens=False` is for texts that have their BOS token already.
          `truncate_prompt_tokens` keeps the last tokens of a longer prompt, at most this number; -1: as many as fit.
        * **Names**: `model` is the name of the model or of an adapter, and `request_id` names the request. Only
          requests of the same `cache_salt` share prefixes in the prefix cache.
        * **Time**: `time_budget_s` ends each prompt's generation after this many seconds and keeps what was generated.
          After `timeout_s` seconds the call raises DeadlineExceeded. If the engine has priorities, waiting requests
          with a lower `priority` run first. `stream_interval` is the least number of tokens per response; 0: all.
        * **Lists**: with a list of prompts, `sampling`, `steering_spec`, `capture`, `model` and `request_id` may each
          be a list with one for each prompt. An output of a prompt without a capture then has a handle without layers.
        * **Many prompts**: at most `max_concurrency` are in flight. Those that the server refuses for lack of room are
          sent again, until none has succeeded for `retry_timeout_s` seconds (default: 60 for a list, 0 for one prompt).
          `progress=True` shows a bar; a function is called with the number of prompts that ended and of all.

        `raw_output=True` returns one Generation per prompt in place of the texts. Raises a SteerError, with the
        `prompt_index` of a list; the other prompts are then aborted. With `return_exceptions=True`, which needs
        `raw_output=True`, the entry of a failed prompt is its SteerError instead.
        """
        check_known(options, GenerateKeywords)
        check_partial(return_exceptions=return_exceptions, raw_output=raw_output)
        given = prompts_from(prompts, options.get("add_special_tokens"))
        results = await self._generate_all(
            "generate", given, sampling, options, is_single=is_one_prompt(prompts), return_exceptions=return_exceptions
        )
        if return_exceptions:
            return results
        complete = complete_of(results)
        if raw_output:
            return complete
        texts = [output.text for generation in complete.generations for output in generation.outputs]
        return Texts(texts, complete.handles)

    @overload
    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[False] = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle]: ...

    @overload
    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        **options: Unpack[ChatKeywords],
    ) -> Generations[CaptureHandle]: ...

    @overload
    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: bool,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle] | Generations[CaptureHandle]: ...

    @overload
    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: Literal[True],
        return_exceptions: bool,
        **options: Unpack[ChatKeywords],
    ) -> PartialGenerations[CaptureHandle]: ...

    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        raw_output: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[ChatKeywords],
    ) -> ChatResponses[CaptureHandle] | Generations[CaptureHandle] | PartialGenerations[CaptureHandle]:
        """Generates the next turn of one conversation or of several; returns one ChatResponse per output.

        With `continue_final_message` the model continues the last message, which must be an assistant's; it becomes
        the response's `prefill`. `add_generation_prompt=False` leaves out the header of the model's turn.
        `chat_template_kwargs` and `tools` go to the chat template. Everything else is as for `generate`.
        """
        check_known(options, ChatKeywords)
        check_partial(return_exceptions=return_exceptions, raw_output=raw_output)
        conversations = [conversation_from(one) for one in conversations_from(messages)]
        prompts = [
            ChatPrompt(
                messages=conversation,
                continue_final_message=options.get("continue_final_message", False),
                add_generation_prompt=options.get("add_generation_prompt"),
                chat_template_kwargs=options.get("chat_template_kwargs") or {},
                tools=tuple(options.get("tools") or ()),
            )
            for conversation in conversations
        ]
        results = await self._generate_all(
            "chat",
            prompts,
            sampling,
            options,
            is_single=is_one_conversation(messages),
            return_exceptions=return_exceptions,
        )
        if return_exceptions:
            return results
        complete = complete_of(results)
        if raw_output:
            return complete
        responses = [
            ChatResponse(prompt.prefill, output.text)
            for prompt, generation in zip(prompts, complete.generations, strict=True)
            for output in generation.outputs
        ]
        return ChatResponses(responses, complete.handles)

    async def stream(
        self,
        prompt: str | Prompt | Sequence[int],
        sampling: SamplingOptions | None = None,
        **options: Unpack[StreamKeywords],
    ) -> AsyncGenerator[str, None]:
        """Yields the text of one output as it is generated; closing the iterator aborts the request.

        The options are those of `generate` for one prompt, without captures. Raises a SteerError.
        """
        check_known(options, StreamKeywords)
        request = await self._request_of_stream(prompt, sampling, options)
        if request.sampling.n not in (None, 1):
            raise InvalidRequest("stream yields one output; call stream_events or generate for more", field="n")
        async with aclosing(self._checked_until("stream", request, options.get("timeout_s"))) as events:
            async for event in events:
                if isinstance(event, TokenDelta) and event.text:
                    yield event.text

    async def stream_events(
        self,
        prompt: str | Prompt | Sequence[int],
        sampling: SamplingOptions | None = None,
        **options: Unpack[StreamEventsKeywords],
    ) -> AsyncGenerator[StreamEvent[CaptureHandle], None]:
        """Yields everything that happens to one request; closing the iterator aborts it.

        These are Started, TokenDelta, OutputFinished with the receipt, and Completed with the usage. The captures of an
        output come as one OutputCaptured before its end; its receiver closes the handle. Those of a live capture come
        as CaptureLabels and CaptureBlock soon after their tokens, as float32 arrays that may be kept. The options are
        those of `generate` for one prompt. Raises a SteerError.
        """
        check_known(options, StreamEventsKeywords)
        request = await self._request_of_stream(prompt, sampling, options)
        checked = self._checked_until("stream_events", request, options.get("timeout_s"))
        async with aclosing(with_handles(checked, request)) as events:
            async for event in events:
                yield event

    @overload
    async def score(
        self, prompts: Prompts, answers: Sequence[Answer], **options: Unpack[ScoreKeywords]
    ) -> list[AnswerScore]: ...

    @overload
    async def score(
        self,
        prompts: Prompts,
        answers: Sequence[Answer],
        *,
        return_exceptions: bool,
        **options: Unpack[ScoreKeywords],
    ) -> list[AnswerScore | SteerError]: ...

    async def score(
        self,
        prompts: Prompts,
        answers: Sequence[Answer],
        *,
        return_exceptions: bool = False,
        **options: Unpack[ScoreKeywords],
    ) -> list[AnswerScore] | list[AnswerScore | SteerError]:
        """How likely each of `answers` is after its prompt, under `steering_spec`; one request for each answer.

        One prompt, or one for each answer. An answer is text, whose tokens must follow those of the prompt, or token
        ids. Positions of the steering are those that it has when the model generates the answer.
        `add_special_tokens` is for text prompts, as in `generate`, and so are `max_concurrency`, `retry_timeout_s`,
        `progress` and `return_exceptions`. Raises a SteerError.
        """
        check_known(options, ScoreKeywords)
        how = self._many_options("score", options, is_single=False, return_exceptions=return_exceptions)
        given = prompts_from(prompts, options.get("add_special_tokens"))
        if isinstance(answers, (str, bytes, Mapping)) or not isinstance(answers, Sequence):
            raise InvalidRequest(f"answers are a list, got {type(answers).__name__}", field="answers")
        if len(given) not in (1, len(answers)):
            raise InvalidRequest(f"{len(given)} prompts for {len(answers)} answers", field="answers")
        paired = given * len(answers) if len(given) == 1 else given
        fields = {name: value for name in SCORED_WITH if (value := options.get(name)) is not None}
        scorer = AnswerScorer(self.complete, paired, answers, fields=fields)
        return await scorer.score_many(options.get("steering_spec"), how)

    async def complete(self, request: GenerateRequest) -> Generation:
        """Runs one request to its end; raises EngineFailed if the response contradicts it. See `submit`."""
        return await collect(checked_events(self, request))

    def _checked_until(
        self, call: str, request: GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[Event, None]:
        events = checked_events(self, request, timeout_s=timeout_s)
        return events if timeout_s is None else until_deadline(events, timeout_s, call)

    async def _request_of_stream(
        self, prompt: str | Prompt | Sequence[int], sampling: SamplingOptions | None, options: StreamKeywords
    ) -> GenerateRequest:
        given = one_prompt_from(prompt, options.get("add_special_tokens"))
        [request] = requests_from([given], sampling, await self._capture_from(options), options, is_single=True)
        return request

    async def _capture_from(self, options: Mapping[str, Any]) -> CaptureSpec | Sequence[CaptureSpec | None] | None:
        """The captures that the keywords of a call choose; an unknown layer is an error with the model's numbers."""
        try:
            return capture_from(options)
        except InvalidRequest as error:
            if error.reason == "UNKNOWN_LAYER":
                await self._check_layers(options.get("capture_layers"))
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
        self,
        call: str,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        options: ManyKeywords,
        *,
        is_single: bool,
        return_exceptions: bool,
    ) -> PartialGenerations[CaptureHandle]:
        how = self._many_options(call, options, is_single=is_single, return_exceptions=return_exceptions)
        capture = await self._capture_from(options)
        requests = requests_from(prompts, sampling, capture, options, is_single=is_single)

        async def one(index: int) -> Generation:
            return await collect(checked_events(self, in_few_pieces(requests[index])))

        generations = await run_many(len(requests), one, how, discard=Generation.release_nowait)
        has_captures = capture is not None and (not requests or any(request.capture for request in requests))
        return PartialGenerations(generations, handles_of(requests, generations) if has_captures else None)

    def _many_options(
        self, call: str, options: Mapping[str, Any], *, is_single: bool, return_exceptions: bool
    ) -> ManyOptions:
        return ManyOptions.of(
            call,
            options,
            is_single=is_single,
            max_concurrency=self.default_concurrency,
            each_timeout_s=self.default_timeout_s,
            return_exceptions=return_exceptions,
        )


def in_few_pieces(request: GenerateRequest) -> GenerateRequest:
    """A request whose tokens nobody sees before its end: they come in pieces, unless it captures live or says how."""
    is_live = request.capture is not None and request.capture.is_live
    if is_live or request.stream_interval is not None:
        return request
    return replace(request, stream_interval=COLLECTED_INTERVAL)


async def checked_events(
    backend: SteeringCalls, request: GenerateRequest, *, timeout_s: float | None = None
) -> AsyncGenerator[Event, None]:
    """The events of `backend.submit_within(request, timeout_s)`.

    Raises EngineFailed at the first event that contradicts the request.
    """
    special = (await backend.load_info()).special_token_ids if request.names_special_tokens else ()
    validator, prompt = ResponseValidator(request, special), request.prompt
    async with aclosing(backend.submit_within(request, timeout_s)) as events:
        async for event in events:
            validator.check(event)
            if isinstance(event, Started) and isinstance(prompt, TextPrompt):
                warn_of_second_bos(prompt, event.prompt_token_ids)
            yield event
