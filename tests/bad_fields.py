"""Requests of which one field is wrong, and the error that each of them must get, on any backend that serves a model.

The fields are those of prompts, sampling, positions, norms and captures. `keep_norm` and `report_change` have no wrong
value on the wire. Steering is at layer 0, whose number in Python is also its entry on the wire.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message

from steer_service.core.backend import ModelInfo
from steer_service.core.errors import InvalidRequest, NotFound, SteerError, Unsupported
from steer_service.wire import generation_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.tensor_pb2 import DTYPE_F16, DTYPE_F32, Tensor

OPERATION = "steering.layers[0].operations[0]"
MAX_INT = 2**31 - 1

RANGE, WRONG = "OUT_OF_RANGE", "INVALID_REQUEST"


@dataclass(frozen=True, kw_only=True)
class BadField:
    """A message and the error that refuses it."""

    message: Message
    field: str
    reason: str
    kind: type[SteerError] = InvalidRequest
    on_wire_only: bool = False
    """It is found in the bytes of the message, so that only a server refuses it in this way."""
    needs_tokenizer: bool = False
    """It is found with the tokenizer or the chat template of a real model."""

    def check(self, error: SteerError, about: str) -> None:
        assert (type(error), error.reason, error.field) == (self.kind, self.reason, self.field), about


def ask(**fields: Any) -> generation_pb2.GenerateRequest:
    """A request that is right but for `fields`."""
    prompt = {} if {"chat", "token_ids"} & fields.keys() else {"text": "one two three"}
    return generation_pb2.GenerateRequest(**{"sampling": {"max_tokens": 4}, **prompt, **fields})


def sampled(**options: Any) -> generation_pb2.GenerateRequest:
    return ask(sampling={"max_tokens": 4, **options})


def turn(role: str = "user", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": "Hi", **fields}


def chat(*messages: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": messages or (turn(),), **fields}


def call(**fields: Any) -> dict[str, Any]:
    return {"name": "tide", "arguments": "{}", **fields}


def captured(prompt: Mapping[str, Any] | None = None, **fields: Any) -> generation_pb2.GenerateRequest:
    return ask(capture={"layers": [0], **fields}, **(prompt or {}))


def bad_fields(info: ModelInfo) -> dict[str, BadField]:
    """Name -> a Generate request that a server of this model refuses."""
    return {
        **{f"chat: {name}": case for name, case in _chats().items()},
        **{f"prompt: {name}": case for name, case in _prompts(info).items()},
        **{f"sampling: {name}": case for name, case in _sampling(info).items()},
        **{f"steering: {name}": case for name, case in _steering(info.hidden_size).items()},
        **{f"positions: {name}": case for name, case in _positions().items()},
        **{f"capture: {name}": case for name, case in _captures().items()},
    }


def _chats() -> dict[str, BadField]:
    def bad(conversation: Mapping[str, Any], field: str, reason: str = WRONG, **more: Any) -> BadField:
        return BadField(message=ask(chat=conversation), field=field, reason=reason, **more)

    first, wire = "prompt.messages[0]", {"on_wire_only": True}
    whole = '{"text": "' + "a" * 60_000 + '"}'
    return {
        "no message": bad({}, "prompt.messages", "EMPTY_PROMPT"),
        "too many messages": bad(chat(*[turn()] * 4097), "prompt.messages", "TOO_MANY_ENTRIES", **wire),
        "no role": bad(chat(turn("")), f"{first}.role"),
        "a long role": bad(chat(turn("r" * 65)), f"{first}.role"),
        "a long name": bad(chat(turn(name="n" * 257)), f"{first}.name", RANGE),
        "a long id of a call": bad(chat(turn("tool", tool_call_id="i" * 257)), f"{first}.tool_call_id", RANGE),
        "too many calls": bad(chat(turn(tool_calls=[call()] * 129)), f"{first}.tool_calls", "TOO_MANY_ENTRIES"),
        "too many calls together": bad(
            chat(*[turn(tool_calls=[call()] * 120)] * 9), "prompt.messages[8].tool_calls", "TOO_MANY_ENTRIES", **wire
        ),
        "a call of nothing": bad(chat(turn(tool_calls=[call(name="")])), f"{first}.tool_calls[0].name"),
        "a call with a long id": bad(chat(turn(tool_calls=[call(id="i" * 257)])), f"{first}.tool_calls[0].id", RANGE),
        "arguments that are no JSON": bad(
            chat(turn(tool_calls=[call(), call(arguments="{")])), f"{first}.tool_calls[1].arguments", "BAD_JSON"
        ),
        "arguments that are a list": bad(
            chat(turn(tool_calls=[call(arguments="[]")])), f"{first}.tool_calls[0].arguments", "BAD_JSON"
        ),
        "a header after a continued message": bad(
            chat(turn("assistant"), continue_final_message=True, add_generation_prompt=True),
            "prompt.add_generation_prompt",
        ),
        "a user's message to continue": bad(chat(continue_final_message=True), "prompt.continue_final_message"),
        "calls to continue": bad(
            chat(turn("assistant", tool_calls=[call()]), continue_final_message=True), "prompt.continue_final_message"
        ),
        "template arguments that are no JSON": bad(
            chat(chat_template_kwargs="{'a': 1}"), "prompt.chat_template_kwargs", "BAD_JSON"
        ),
        "long template arguments": bad(
            chat(chat_template_kwargs='{"a": "' + "a" * (16 << 10) + '"}'), "prompt.chat_template_kwargs", RANGE
        ),
        "an argument of the renderer": bad(
            chat(chat_template_kwargs='{"tokenize": false}'), "prompt.chat_template_kwargs", "RESERVED_KEY"
        ),
        "an argument that the template does not use": bad(
            chat(chat_template_kwargs='{"no_such_argument": 1}'),
            "prompt.chat_template_kwargs",
            "UNKNOWN_TEMPLATE_KEY",
            needs_tokenizer=True,
        ),
        "a tool that is no JSON": bad(chat(tools=["{}", "tide"]), "prompt.tools[1]", "BAD_JSON"),
        "a large tool": bad(chat(tools=[whole[:-2] + "a" * 6_000 + '"}']), "prompt.tools[0]", RANGE),
        "large tools": bad(chat(tools=[whole] * 20), "prompt.tools", RANGE, **wire),
        "too many tools": bad(chat(tools=["{}"] * 129), "prompt.tools", "TOO_MANY_ENTRIES", **wire),
    }


def _prompts(info: ModelInfo) -> dict[str, BadField]:
    def bad(field: str, reason: str = RANGE, *, kind: type[SteerError] = InvalidRequest, **fields: Any) -> BadField:
        return BadField(message=ask(**fields), field=field, reason=reason, kind=kind)

    limit = info.max_model_len
    return {
        "special tokens of a chat": bad("add_special_tokens", WRONG, chat=chat(), add_special_tokens=False),
        "special tokens of token ids": bad(
            "add_special_tokens", WRONG, token_ids={"ids": [1]}, add_special_tokens=True
        ),
        "more kept than the model takes": bad("truncate_prompt_tokens", truncate_prompt_tokens=limit + 1),
        "far more kept": bad("truncate_prompt_tokens", truncate_prompt_tokens=MAX_INT + 1),
        "an id outside the vocabulary among those kept": bad(
            "prompt.token_ids", "BAD_TOKEN", token_ids={"ids": [1, info.vocab_size]}, truncate_prompt_tokens=1
        ),
        "a priority without the policy": bad("priority", "NO_PRIORITY", kind=Unsupported, priority=-1),
        "a long interval": bad("stream_interval", stream_interval=MAX_INT + 1),
        "another model": bad("model", "UNKNOWN_MODEL", kind=NotFound, model="other"),
    }


def _sampling(info: ModelInfo) -> dict[str, BadField]:
    def bad(field: str, reason: str = RANGE, *, kind: type[SteerError] = InvalidRequest, **options: Any) -> BadField:
        return BadField(message=sampled(**options), field=f"sampling.{field}", reason=reason, kind=kind)

    def constrained(field: str, reason: str = RANGE, **constraint: Any) -> BadField:
        return bad(f"structured_outputs{field}", reason, structured_outputs=constraint)

    def long(field: str, **options: Any) -> BadField:
        message, field = sampled(**options), f"sampling.{field}"
        return BadField(message=message, field=field, reason="TOO_MANY_ENTRIES", on_wire_only=True)

    vocab = info.vocab_size
    return {
        "rows only with a least number of tokens": bad("min_tokens", WRONG, max_tokens=0, min_tokens=1),
        "log-probabilities of the prompt beyond the engine's": bad(
            "prompt_logprobs", prompt_logprobs=info.max_logprobs + 1
        ),
        "log-probabilities of the prompt beyond any": bad("prompt_logprobs", prompt_logprobs=MAX_INT),
        "an empty bad word": bad("bad_words[1]", WRONG, bad_words=["a", ""]),
        "a long bad word": bad("bad_words[0]", WRONG, bad_words=["a" * 257]),
        "too many bad words": long("bad_words", bad_words=["a"] * 65),
        "an allowed token outside the vocabulary": bad(
            "allowed_token_ids[1]", "BAD_TOKEN", allowed_token_ids=[1, vocab]
        ),
        "too many allowed tokens": long("allowed_token_ids", allowed_token_ids=range(1025)),
        "no constraint": constrained("", "MISSING_FIELD"),
        "a schema that is no JSON": constrained(".json", "BAD_JSON", json="{"),
        "a schema that is a list": constrained(".json", "BAD_JSON", json="[]"),
        "a schema with a number that is none": constrained(".json", "BAD_JSON", json='{"a": NaN}'),
        "a deep schema": constrained(".json", json='{"a":' * 65 + "{}" + "}" * 65),
        "a large schema": constrained(".json", json='{"a": "' + "a" * (1 << 16) + '"}'),
        "an empty expression": constrained(".regex", regex=""),
        "a long expression": constrained(".regex", regex="a" * 4097),
        "an expression with NUL": constrained(".regex", "BAD_TEXT", regex="a\0b"),
        "an empty grammar": constrained(".grammar", grammar=""),
        "a large grammar": constrained(".grammar", grammar="a" * ((1 << 16) + 1)),
        "no choice": constrained(".choice", choice={}),
        "an empty choice": constrained(".choice[1]", choice={"texts": ["a", ""]}),
        "too many choices": long("structured_outputs.choice", structured_outputs={"choice": {"texts": ["a"] * 1025}}),
        "large choices": constrained(".choice", choice={"texts": ["a" * 60_000] * 2}),
        "a constraint that nothing ends": bad("ignore_eos", WRONG, structured_outputs={"regex": "a"}, ignore_eos=True),
    }


def _steering(width: int) -> dict[str, BadField]:
    vector = steering_pb2.Vector(
        inline=Tensor(dtype=DTYPE_F32, shape=[width], data=np.ones(width, np.float32).tobytes())
    )

    def steered(*operations: Mapping[str, Any], **layer: Any) -> generation_pb2.GenerateRequest:
        return ask(steering={"layers": [{"layer": 0, "operations": operations, **layer}]})

    def added(field: str, reason: str, kind: type[SteerError] = InvalidRequest, **add: Any) -> BadField:
        message = steered({"add": {"vector": vector, **add}})
        return BadField(message=message, field=f"{OPERATION}.{field}", reason=reason, kind=kind)

    def limited(most: float, reason: str = RANGE) -> BadField:
        message = steered({"ablation": {"vector": vector}, "max_relative_change": most})
        return BadField(message=message, field=f"{OPERATION}.max_relative_change", reason=reason)

    def placed(field: str, reason: str = RANGE, **positions: Any) -> BadField:
        message = steered({"projection_cap": {"vector": vector, "max": 1.0}, "positions": positions})
        return BadField(message=message, field=f"{OPERATION}.positions{field}", reason=reason)

    different = [{"add": {"vector": vector}, "positions": {"ranges": [{"first": place}]}} for place in range(65)]
    return {
        "an unknown scaling": added("scaling", "UNKNOWN_SCALING", Unsupported, scaling=3),
        "a relative scale that is infinite": added("scale", "NON_FINITE", scaling=2, scale=float("inf")),
        "a relative scale that is too large": added("scale", "NON_FINITE", scaling=2, scale=1e39),
        "a relative addition of no direction": added(
            "vector", "ZERO_NORM", scaling=2, vector={"inline": {**_fields(vector.inline), "data": bytes(4 * width)}}
        ),
        "a change of nothing": limited(0.0),
        "a negative change": limited(-0.5),
        "a change that is no number": limited(float("nan"), "NON_FINITE"),
        "an infinite change": limited(float("inf"), "NON_FINITE"),
        "a change beyond float32": limited(1e39),
        "no positions of an operation": placed("", "EMPTY_POSITIONS"),
        "reversed positions of an operation": placed(".ranges[0]", "EMPTY_POSITIONS", ranges=[{"first": 2, "last": 1}]),
        "positions of an operation beyond the request": placed(".ranges[0]", ranges=[{"first": 1000}]),
        "messages of a text": placed(".messages[0]", "NO_MESSAGES", messages=[0]),
        "different positions of too many operations": BadField(
            message=steered(*different), field="steering.layers", reason="PROGRAM_TOO_LARGE"
        ),
        "an unknown hook point": BadField(
            message=steered({"ablation": {"vector": vector}}, hook=2),
            field="steering.layers[0].hook",
            reason="UNKNOWN_HOOK_POINT",
            kind=Unsupported,
        ),
    }


def _positions() -> dict[str, BadField]:
    def bad(field: str, reason: str = RANGE, prompt: Mapping[str, Any] | None = None, **positions: Any) -> BadField:
        message = captured(prompt, positions=positions)
        return BadField(message=message, field=f"capture.positions{field}", reason=reason)

    def long(field: str, entries: Sequence[Any]) -> BadField:
        message = captured(positions={field: entries})
        return BadField(
            message=message, field=f"capture.positions.{field}", reason="TOO_MANY_ENTRIES", on_wire_only=True
        )

    talk, nothing = {"chat": chat()}, {"sampling": {"max_tokens": 0}}
    return {
        "nothing": bad("", "EMPTY_POSITIONS"),
        "before the answer": bad(".generated_ranges[1].first", generated_ranges=[{}, {"first": -1, "last": 1}]),
        "a negative end": bad(".generated_ranges[0].last", generated_ranges=[{"last": -1}]),
        "beyond any answer": bad(".generated_ranges[0].last", generated_ranges=[{"last": MAX_INT}]),
        "a reversed part of the answer": bad(
            ".generated_ranges[0]", "EMPTY_POSITIONS", generated_ranges=[{"first": 3, "last": 2}]
        ),
        "too many parts of the answer": long("generated_ranges", [{}] * 1025),
        "the answer of rows only": bad(".generated", "EMPTY_POSITIONS", nothing, generated=True),
        "a part of the answer of rows only": bad(
            ".generated_ranges[0]", "EMPTY_POSITIONS", nothing, generated_ranges=[{}]
        ),
        "a message beyond any chat": bad(".messages[1]", prompt=talk, messages=[0, 4096]),
        "a message that the chat lacks": bad(".messages[0]", prompt=talk, messages=[3]),
        "a message of a text": bad(".messages[0]", "NO_MESSAGES", messages=[-1]),
        "too many messages": long("messages", [0] * 1025),
        "a role of a text": bad(".roles[0]", "NO_MESSAGES", roles=["user"]),
        "a role that nobody has": bad(".roles", "EMPTY_POSITIONS", talk, roles=["nobody"]),
        "a role without a name": bad(".roles[0]", WRONG, roles=[""]),
        "a long role": bad(".roles[0]", WRONG, roles=["r" * 65]),
        "too many roles": long("roles", ["user"] * 65),
    }


def _captures() -> dict[str, BadField]:
    def bad(field: str, reason: str, kind: type[SteerError] = InvalidRequest, **fields: Any) -> BadField:
        return BadField(message=captured(**fields), field=f"capture.{field}", reason=reason, kind=kind)

    return {
        "an unknown pooling": bad("pooling", "UNKNOWN_POOLING", Unsupported, pooling=4),
        "a pooled live capture": bad("pooling", "BAD_POOLING", pooling=1, timing=2),
        "an unknown dtype": bad("dtype", "UNKNOWN_DTYPE", dtype=77),
        "another dtype than the model's": bad("dtype", "UNSUPPORTED_DTYPE", dtype=DTYPE_F16),
        "an unknown hook point": bad("hook", "UNKNOWN_HOOK_POINT", Unsupported, hook=2),
        "an unknown site": bad("site", "UNKNOWN_SITE", Unsupported, site=9),
        "an unknown timing": bad("timing", "UNKNOWN_TIMING", Unsupported, timing=9),
    }


def bad_prompts(info: ModelInfo) -> dict[str, tuple[str, BadField]]:
    """Name -> a method of the tokenizer service and a request that it refuses."""

    def tokenize(field: str, reason: str, kind: type[SteerError] = InvalidRequest, **fields: Any) -> BadField:
        return BadField(message=tokenizer_pb2.TokenizeRequest(**fields), field=field, reason=reason, kind=kind)

    def detokenize(field: str, reason: str, kind: type[SteerError] = InvalidRequest, **fields: Any) -> BadField:
        message, on_wire_only = tokenizer_pb2.DetokenizeRequest(**fields), reason == "TOO_MANY_ENTRIES"
        return BadField(message=message, field=field, reason=reason, kind=kind, on_wire_only=on_wire_only)

    def render(field: str, reason: str, kind: type[SteerError] = InvalidRequest, **fields: Any) -> BadField:
        return BadField(message=tokenizer_pb2.RenderRequest(**fields), field=field, reason=reason, kind=kind)

    limit = info.max_model_len
    cases = {
        "a text of another model": tokenize("model", "UNKNOWN_MODEL", NotFound, text="a", model="other"),
        "a text of a model with a long name": tokenize("model", WRONG, text="a", model="m" * 257),
        "no text": tokenize("prompt.text", "EMPTY_PROMPT"),
        "a long text": tokenize("prompt", "PROMPT_TOO_LONG", text="a b " * limit),
        "tokens of another model": detokenize("model", "UNKNOWN_MODEL", NotFound, token_ids=[1], model="other"),
        "a token outside the vocabulary": detokenize("token_ids", "BAD_TOKEN", token_ids=[1, info.vocab_size]),
        "too many tokens": detokenize("token_ids", "TOO_MANY_ENTRIES", token_ids=[1] * (limit + 1)),
        "no prompt": render("prompt", "MISSING_FIELD"),
        "no token": render("prompt.token_ids", "EMPTY_PROMPT", token_ids={}),
        "no message": render("prompt.messages", "EMPTY_PROMPT", chat={}),
        "too many token ids": render("prompt", "PROMPT_TOO_LONG", token_ids={"ids": [1] * (limit + 1)}),
        "a prompt's token outside the vocabulary": render(
            "prompt.token_ids", "BAD_TOKEN", token_ids={"ids": [info.vocab_size]}
        ),
        "special tokens of a chat": render("add_special_tokens", WRONG, chat=chat(), add_special_tokens=True),
        "more kept than the model takes": render(
            "truncate_prompt_tokens", RANGE, text="a", truncate_prompt_tokens=limit + 1
        ),
        "template arguments that are no JSON": render(
            "prompt.chat_template_kwargs", "BAD_JSON", chat=chat(chat_template_kwargs="x")
        ),
        "a user's message to continue": render(
            "prompt.continue_final_message", WRONG, chat=chat(continue_final_message=True)
        ),
        "a tool that is no JSON": render("prompt.tools[0]", "BAD_JSON", chat=chat(tools=["x"])),
    }
    return {name: (type(case.message).__name__.removesuffix("Request"), case) for name, case in cases.items()}


def _fields(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": tensor.shape}
