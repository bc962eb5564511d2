"""Requests for the tokens and the text of prompts, and their responses <-> messages."""

from typing import Any

from steer_service.core.errors import within
from steer_service.core.prompt import TextPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.wire import tokenizer_pb2
from steer_service.wire.capture import boundaries_from_proto, boundaries_to_proto
from steer_service.wire.fields import bad_stream
from steer_service.wire.request import kept_from_proto, kept_to_proto, prompt_from_proto, prompt_to_proto


def tokenize_to_proto(request: RenderRequest) -> tokenizer_pb2.TokenizeRequest:
    """A request for the tokens of a text as a message."""
    assert isinstance(request.prompt, TextPrompt), "Tokenize takes a text"
    return tokenizer_pb2.TokenizeRequest(**prompt_to_proto(request.prompt), **_options_to_proto(request))


def tokenize_from_proto(message: tokenizer_pb2.TokenizeRequest) -> RenderRequest:
    """The request in a message; raises InvalidRequest with the path of the field, from `prompt` on."""
    has_flag = message.HasField("add_special_tokens")
    with within("prompt"):
        prompt = TextPrompt(text=message.text, add_special_tokens=message.add_special_tokens if has_flag else True)
    return RenderRequest(prompt=prompt, **_options_from_proto(message))


def render_to_proto(request: RenderRequest) -> tokenizer_pb2.RenderRequest:
    """A request for the tokens of a prompt as a message."""
    return tokenizer_pb2.RenderRequest(
        **prompt_to_proto(request.prompt),
        **_options_to_proto(request),
        truncate_prompt_tokens=kept_to_proto(request.truncate_prompt_tokens),
    )


def render_from_proto(message: tokenizer_pb2.RenderRequest) -> RenderRequest:
    """The request in a message; raises InvalidRequest with the path of the field, from `prompt` on."""
    return RenderRequest(
        prompt=prompt_from_proto(message),
        truncate_prompt_tokens=kept_from_proto(message),
        **_options_from_proto(message),
    )


def detokenize_to_proto(request: DetokenizeRequest) -> tokenizer_pb2.DetokenizeRequest:
    """A request for the text of tokens as a message."""
    return tokenizer_pb2.DetokenizeRequest(
        model=request.model, token_ids=request.token_ids, skip_special_tokens=request.skip_special_tokens
    )


def detokenize_from_proto(message: tokenizer_pb2.DetokenizeRequest) -> DetokenizeRequest:
    """The request in a message; raises InvalidRequest."""
    return DetokenizeRequest(
        model=message.model, token_ids=tuple(message.token_ids), skip_special_tokens=message.skip_special_tokens
    )


def tokenized_to_proto(tokens: PromptTokens) -> tokenizer_pb2.TokenizeResponse:
    """The tokens of a text as a message, which does not repeat the text."""
    return tokenizer_pb2.TokenizeResponse(**_tokens_to_proto(tokens))


def tokenized_from_proto(message: tokenizer_pb2.TokenizeResponse, request: RenderRequest) -> PromptTokens:
    """The tokens in the response to `request`; raises EngineFailed (BAD_STREAM) if its parts contradict each other."""
    assert isinstance(request.prompt, TextPrompt), "Tokenize takes a text"
    return PromptTokens(text=request.prompt.text, **_tokens_from_proto(message, request))


def rendered_to_proto(tokens: PromptTokens) -> tokenizer_pb2.RenderResponse:
    """The tokens of a prompt as a message."""
    return tokenizer_pb2.RenderResponse(
        text=tokens.text,
        message_boundaries=boundaries_to_proto(tokens.message_boundaries),
        prefill=tokens.prefill,
        boundaries_missing_reason=tokens.boundaries_missing_reason,
        **_tokens_to_proto(tokens),
    )


def rendered_from_proto(message: tokenizer_pb2.RenderResponse, request: RenderRequest) -> PromptTokens:
    """The tokens in the response to `request`; raises EngineFailed (BAD_STREAM) if its parts contradict each other."""
    return PromptTokens(
        text=message.text,
        message_boundaries=boundaries_from_proto(message.message_boundaries),
        prefill=message.prefill,
        boundaries_missing_reason=message.boundaries_missing_reason,
        **_tokens_from_proto(message, request),
    )


def _options_to_proto(request: RenderRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("model", "with_token_texts", "with_offsets")}


def _options_from_proto(message: tokenizer_pb2.TokenizeRequest | tokenizer_pb2.RenderRequest) -> dict[str, Any]:
    return {name: getattr(message, name) for name in ("model", "with_token_texts", "with_offsets")}


def _tokens_to_proto(tokens: PromptTokens) -> dict[str, Any]:
    offsets = None
    if tokens.offsets is not None:
        starts, ends = zip(*tokens.offsets, strict=True)
        offsets = tokenizer_pb2.TokenOffsets(starts=starts, ends=ends)
    return {
        "token_ids": tokens.token_ids,
        "token_texts": tokens.token_texts,
        "offsets": offsets,
        "special_positions": tokens.special_positions,
    }


def _tokens_from_proto(
    message: tokenizer_pb2.TokenizeResponse | tokenizer_pb2.RenderResponse, request: RenderRequest
) -> dict[str, Any]:
    count, offsets = len(message.token_ids), message.offsets if message.HasField("offsets") else None
    parts = [message.token_texts] if request.with_token_texts else []
    parts += [offsets.starts, offsets.ends] if offsets is not None else []
    if any(len(part) != count for part in parts):
        raise bad_stream(f"{count} tokens have {', '.join(str(len(part)) for part in parts)} texts or places")
    return {
        "token_ids": tuple(message.token_ids),
        "token_texts": tuple(message.token_texts) if request.with_token_texts else None,
        "offsets": None if offsets is None else tuple(zip(offsets.starts, offsets.ends, strict=True)),
        "special_positions": tuple(message.special_positions),
    }
