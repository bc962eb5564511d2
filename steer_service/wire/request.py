"""GenerateRequest, its prompt and its sampling options <-> messages."""

from collections.abc import Container, Iterator, Mapping
from itertools import chain
from typing import Any

from google.protobuf.duration_pb2 import Duration

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.json_fields import as_json, json_object
from steer_service.core.number_limits import MAX_INT, MAX_TEMPLATE_KWARGS_BYTES, MAX_TOOL_BYTES_OF_CHAT
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt, ToolCall, only_for_text
from steer_service.core.request import AS_MANY_AS_FIT, GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.wire import generation_pb2, tokenizer_pb2
from steer_service.wire.capture import capture_from_proto, capture_to_proto
from steer_service.wire.fields import missing
from steer_service.wire.steering import NO_VECTORS, steering_from_proto, steering_to_proto

_OPTIONAL_SCALARS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "logprobs",
    "prompt_logprobs",
    "include_stop",
)
"""Options that are None, or not set, for the server's default; the names are the same on both sides."""


def request_to_proto(request: GenerateRequest, named: Container[bytes] = ()) -> generation_pb2.GenerateRequest:
    """`request` as a message that carries its vectors, except those whose digests are in `named`."""
    return generation_pb2.GenerateRequest(
        request_id=request.request_id,
        model=request.model,
        sampling=sampling_to_proto(request.sampling),
        steering=steering_to_proto(request.steering, named) if request.steering is not None else None,
        capture=capture_to_proto(request.capture) if request.capture is not None else None,
        cache_salt=request.cache_salt,
        time_budget=_duration(request.time_budget_s) if request.time_budget_s is not None else None,
        priority=request.priority,
        stream_interval=request.stream_interval,
        truncate_prompt_tokens=kept_to_proto(request.truncate_prompt_tokens),
        **prompt_to_proto(request.prompt),
    )


def request_from_proto(
    message: generation_pb2.GenerateRequest, stored: Mapping[bytes, Float32Array] = NO_VECTORS
) -> GenerateRequest:
    """The request in a message; vectors that it names by digest come from `stored`.

    Raises InvalidRequest, Unsupported or MissingVectors with the full path of the field.
    """
    prompt = prompt_from_proto(message)
    with within("sampling"):
        sampling = sampling_from_proto(message.sampling)
    with within("steering"):
        steering = steering_from_proto(message.steering, stored) if message.HasField("steering") else None
    with within("capture"):
        capture = capture_from_proto(message.capture) if message.HasField("capture") else None
    return GenerateRequest(
        prompt=prompt,
        sampling=sampling,
        steering=steering,
        capture=capture,
        request_id=message.request_id,
        model=message.model,
        cache_salt=message.cache_salt,
        time_budget_s=_seconds(message.time_budget) if message.HasField("time_budget") else None,
        priority=message.priority if message.HasField("priority") else None,
        stream_interval=message.stream_interval if message.HasField("stream_interval") else None,
        truncate_prompt_tokens=kept_from_proto(message),
    )


def sampling_to_proto(options: SamplingOptions) -> generation_pb2.SamplingOptions:
    """`options` as a message; fields that are None are not set."""
    given = {name: getattr(options, name) for name in _OPTIONAL_SCALARS if getattr(options, name) is not None}
    return generation_pb2.SamplingOptions(
        **given,
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        logit_bias=options.logit_bias,
        bad_words=options.bad_words,
        allowed_token_ids=options.allowed_token_ids,
        structured_outputs=_structured_to_proto(options.structured_outputs),
    )


def sampling_from_proto(message: generation_pb2.SamplingOptions) -> SamplingOptions:
    """The options in a message; fields that are not set are None. Raises InvalidRequest."""
    given: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_SCALARS if message.HasField(name)}
    return SamplingOptions(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
        bad_words=tuple(message.bad_words),
        allowed_token_ids=tuple(message.allowed_token_ids) or None,
        structured_outputs=_structured_from_proto(message),
    )


def _structured_to_proto(constraint: StructuredOutputs | None) -> generation_pb2.StructuredOutputs | None:
    if constraint is None:
        return None
    return generation_pb2.StructuredOutputs(
        json=constraint.json,
        regex=constraint.regex,
        grammar=constraint.grammar,
        choice=generation_pb2.Choices(texts=constraint.choice) if constraint.choice is not None else None,
    )


def _structured_from_proto(message: generation_pb2.SamplingOptions) -> StructuredOutputs | None:
    if not message.HasField("structured_outputs"):
        return None
    given = message.structured_outputs
    with within("structured_outputs"):
        match given.WhichOneof("constraint"):
            case "choice":
                return StructuredOutputs(choice=tuple(given.choice.texts))
            case None:
                raise missing("the constraint")
            case kind:
                return StructuredOutputs(**{kind: getattr(given, kind)})


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(1, round(seconds * 1e9)))
    return duration


def _seconds(duration: Duration) -> float:
    return (int(duration.seconds) * 10**9 + int(duration.nanos)) / 1e9


def kept_to_proto(keep: int | None) -> int | None:
    """`truncate_prompt_tokens` in a message."""
    return 0 if keep == AS_MANY_AS_FIT else keep


def kept_from_proto(message: generation_pb2.GenerateRequest | tokenizer_pb2.RenderRequest) -> int | None:
    """`truncate_prompt_tokens` of a message; None if it is not set."""
    if not message.HasField("truncate_prompt_tokens"):
        return None
    return message.truncate_prompt_tokens or AS_MANY_AS_FIT


def prompt_to_proto(prompt: Prompt) -> dict[str, Any]:
    """The fields of a message with a prompt."""
    match prompt:
        case TextPrompt():
            return {"text": prompt.text} | ({} if prompt.add_special_tokens else {"add_special_tokens": False})
        case TokenPrompt():
            return {"token_ids": generation_pb2.TokenIds(ids=prompt.token_ids)}
        case ChatPrompt():
            return {"chat": _chat_to_proto(prompt)}


def prompt_from_proto(message: generation_pb2.GenerateRequest | tokenizer_pb2.RenderRequest) -> Prompt:
    """The prompt in a message; raises InvalidRequest with the path of the field, from `prompt` on."""
    if message.HasField("add_special_tokens") and not message.HasField("text"):
        raise only_for_text()
    with within("prompt"):
        return _prompt_from_proto(message)


def _prompt_from_proto(message: generation_pb2.GenerateRequest | tokenizer_pb2.RenderRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(
                text=message.text,
                add_special_tokens=message.add_special_tokens if message.HasField("add_special_tokens") else True,
            )
        case "token_ids":
            return TokenPrompt(token_ids=tuple(message.token_ids.ids))
        case "chat":
            return _chat_from_proto(message.chat)
        case _:
            raise missing("the prompt")


def _chat_to_proto(prompt: ChatPrompt) -> generation_pb2.ChatPrompt:
    message = generation_pb2.ChatPrompt(
        messages=map(_message_to_proto, prompt.messages),
        continue_final_message=prompt.continue_final_message,
        chat_template_kwargs=as_json(prompt.chat_template_kwargs) if prompt.chat_template_kwargs else "",
        tools=map(as_json, prompt.tools),
    )
    if prompt.add_generation_prompt is not None:
        message.add_generation_prompt = prompt.add_generation_prompt
    return message


def _chat_from_proto(message: generation_pb2.ChatPrompt) -> ChatPrompt:
    _check_tool_bytes(message)
    return ChatPrompt(
        messages=tuple(_messages_from_proto(message)),
        continue_final_message=message.continue_final_message,
        add_generation_prompt=message.add_generation_prompt if message.HasField("add_generation_prompt") else None,
        chat_template_kwargs=json_object(
            message.chat_template_kwargs or "{}", "chat_template_kwargs", MAX_TEMPLATE_KWARGS_BYTES
        ),
        tools=tuple(message.tools),
    )


def _check_tool_bytes(message: generation_pb2.ChatPrompt) -> None:
    """Raises InvalidRequest for more JSON than a server parses for one request."""
    arguments = (call.arguments for turn in message.messages for call in turn.tool_calls)
    size = sum(len(text.encode()) for text in chain(message.tools, arguments))
    if size > MAX_TOOL_BYTES_OF_CHAT:
        raise InvalidRequest(
            f"{size} bytes of tools and tool calls, at most {MAX_TOOL_BYTES_OF_CHAT}",
            reason="OUT_OF_RANGE",
            field="tools",
        )


def _messages_from_proto(message: generation_pb2.ChatPrompt) -> Iterator[ChatMessage]:
    for index, turn in enumerate(message.messages):
        with within(f"messages[{index}]"):
            yield ChatMessage(
                role=turn.role,
                content=turn.content,
                name=turn.name,
                tool_calls=tuple(_tool_calls_from_proto(turn)),
                tool_call_id=turn.tool_call_id,
                reasoning_content=turn.reasoning_content,
            )


def _message_to_proto(turn: ChatMessage) -> generation_pb2.ChatMessage:
    return generation_pb2.ChatMessage(
        role=turn.role,
        content=turn.content,
        name=turn.name,
        tool_calls=[
            generation_pb2.ToolCall(id=call.id, name=call.name, arguments=as_json(call.arguments))
            for call in turn.tool_calls
        ],
        tool_call_id=turn.tool_call_id,
        reasoning_content=turn.reasoning_content,
    )


def _tool_calls_from_proto(turn: generation_pb2.ChatMessage) -> Iterator[ToolCall]:
    for index, call in enumerate(turn.tool_calls):
        with within(f"tool_calls[{index}]"):
            arguments = json_object(call.arguments or "{}", "arguments", MAX_INT)
            yield ToolCall(id=call.id, name=call.name, arguments=arguments)
