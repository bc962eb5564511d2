"""GenerateRequest, its prompt and its sampling options <-> messages."""

from typing import Any

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.request import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    Prompt,
    SamplingOptions,
    TextPrompt,
    TokenPrompt,
)
from steer_service.wire import generation_pb2
from steer_service.wire.capture import capture_from_proto, capture_to_proto
from steer_service.wire.fields import LARGEST_UINT32, missing, not_built, uint32, utf8
from steer_service.wire.steering import steering_from_proto, steering_to_proto

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
    "include_stop",
)
"""Sampling options that are None, or unset, where the server's default is meant; same name on both sides."""


def request_to_proto(request: GenerateRequest) -> generation_pb2.GenerateRequest:
    """`request` as a message; raises InvalidRequest for a value that the wire cannot carry."""
    message = generation_pb2.GenerateRequest(
        request_id=request.request_id,
        model=utf8(request.model, "model"),
        cache_salt=utf8(request.cache_salt, "cache_salt"),
    )
    with within("prompt"):
        _prompt_to_proto(request.prompt, message)
    with within("sampling"):
        message.sampling.CopyFrom(sampling_to_proto(request.sampling))
    if request.steering is not None:
        with within("steering"):
            message.steering.CopyFrom(steering_to_proto(request.steering))
    if request.capture is not None:
        with within("capture"):
            message.capture.CopyFrom(capture_to_proto(request.capture))
    return message


def request_from_proto(message: generation_pb2.GenerateRequest) -> GenerateRequest:
    """The request of a message; raises InvalidRequest or Unsupported with the full path of the offending field."""
    if message.HasField("time_budget"):
        raise not_built("a time budget", "time_budget")
    with within("prompt"):
        prompt = _prompt_from_proto(message)
    with within("sampling"):
        sampling = sampling_from_proto(message.sampling)
    with within("steering"):
        steering = steering_from_proto(message.steering) if message.HasField("steering") else None
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
    )


def sampling_to_proto(options: SamplingOptions) -> generation_pb2.SamplingOptions:
    """`options` as a message; what is None stays unset."""
    given = {name: getattr(options, name) for name in _OPTIONAL_SCALARS if getattr(options, name) is not None}
    return generation_pb2.SamplingOptions(
        **given,
        stop=[utf8(text, f"stop[{index}]") for index, text in enumerate(options.stop)],
        stop_token_ids=[
            uint32(token, "token id", f"stop_token_ids[{index}]") for index, token in enumerate(options.stop_token_ids)
        ],
        logit_bias={
            uint32(token, "token id", f"logit_bias[{token}]"): bias for token, bias in options.logit_bias.items()
        },
    )


def sampling_from_proto(message: generation_pb2.SamplingOptions) -> SamplingOptions:
    """The options of a message; what is unset is None. Raises InvalidRequest."""
    given: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_SCALARS if message.HasField(name)}
    return SamplingOptions(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
    )


def _prompt_to_proto(prompt: Prompt, message: generation_pb2.GenerateRequest) -> None:
    match prompt:
        case TextPrompt():
            message.text = utf8(prompt.text, "text")
        case TokenPrompt():
            largest = max(prompt.token_ids)
            if largest > LARGEST_UINT32:
                raise InvalidRequest(
                    f"token id {largest} is outside 0..{LARGEST_UINT32}", reason="BAD_TOKEN", field="token_ids"
                )
            message.token_ids.ids.extend(prompt.token_ids)
        case ChatPrompt():
            message.chat.continue_final_message = prompt.continue_final_message
            for index, turn in enumerate(prompt.messages):
                with within(f"messages[{index}]"):
                    message.chat.messages.add(role=utf8(turn.role, "role"), content=utf8(turn.content, "content"))


def _prompt_from_proto(message: generation_pb2.GenerateRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(text=message.text)
        case "token_ids":
            return TokenPrompt(token_ids=tuple(message.token_ids.ids))
        case "chat":
            return ChatPrompt(
                messages=tuple(ChatMessage(role=turn.role, content=turn.content) for turn in message.chat.messages),
                continue_final_message=message.chat.continue_final_message,
            )
        case _:
            raise missing("the prompt", "")
