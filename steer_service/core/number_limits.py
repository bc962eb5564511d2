"""The least and the most of every number in a request, and of the length of every list and text, in one table.

A limit is a constant, or it follows from the model and the engine. `core.sampling_options`, `core.checks` and the
documentation (docs/limits.md) read the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer_service.core.backend import ModelInfo

MAX_OUTPUTS = 8
MAX_LOGPROBS = 1 << 16
"""Log-probabilities at one token, which travel in one message; with texts of usual length that is below 4 MiB."""

DEFAULT_MAX_LOGPROBS = 20
"""Those of a server that does not say how many it returns at most."""

MAX_TEMPERATURE = 100.0
MAX_TIME_BUDGET_S = 86_400.0
"""Seconds of a time budget at most: one day."""

MAX_IDENTIFIER_LENGTH = 128
"""Characters of a request id or a client id."""
MAX_NAME_LENGTH = 256
"""Characters of a model's name or of a cache salt."""

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 64
MAX_BAD_WORD_LENGTH = 256
MAX_BAD_WORD_TOKENS = 1024
"""Tokens of all bad words of a request together; vLLM's V2 runner dies of more."""
MAX_ALLOWED_TOKEN_IDS = 1024

MAX_CONSTRAINT_BYTES = 1 << 16
MAX_REGEX_BYTES = 1 << 12
MAX_CHOICES = 1024
MAX_SCHEMA_NESTING = 64

MAX_MESSAGES = 4096
MAX_ROLE_LENGTH = 64
MAX_CALL_NAME_LENGTH = 256
"""Characters of the name of an author, a tool or a call."""
MAX_LAYERS = 4096
"""Most layers of one spec: far above any model, and low enough that a hostile spec is cheap to refuse."""
MAX_RANGES = 1024
"""Ranges of one scope at most, and as many generated ranges."""
MAX_NAMED_MESSAGES = 1024
"""Messages that positions name at most."""
MAX_NAMED_ROLES = 64
"""Roles that positions name at most."""
MAX_POSITION_ENTRIES = 1 << 14
"""Ranges, messages and roles that all positions of a steering spec name at most."""
MAX_SCOPES = 64
"""Distinct scopes of the operations of one spec: each row has a mask with one bit for each."""
MAX_SPANS_OF_SCOPE = 1 << 14
"""Parts of one scope at most: the special tokens of a chat of 4096 messages cut its prompt into about 12,000."""
MAX_SPANS = 1 << 15
"""Parts of all scopes of a steering spec at most: two scopes may be cut as often as one may be."""

MAX_TEMPLATE_KWARGS_BYTES = 16 << 10
MAX_TOOL_BYTES = 64 << 10
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_TOOL_CALLS_OF_CHAT = 1024
MAX_TOOL_BYTES_OF_CHAT = 1 << 20
"""Bytes of JSON of all tools and tool calls of a request: parsing them takes about 35 ms of the server's event loop."""

MAX_INT = 2**31 - 1
MAX_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimit:
    """A limit that follows from the model and the engine."""

    text: str
    """The limit in words of ModelInfo, for people."""
    of: Callable[["ModelInfo"], float]
    """The limit of a model."""


LAST_TOKEN = ModelLimit(text="vocab_size - 1", of=lambda info: info.vocab_size - 1)
MODEL_LENGTH = ModelLimit(text="max_model_len", of=lambda info: info.max_model_len)
LONGEST_PROMPT = ModelLimit(text="max_prompt_tokens", of=lambda info: info.max_prompt_tokens)
LAST_LAYER = ModelLimit(text="layer_count - 1", of=lambda info: info.layer_count - 1)
MOST_LOGPROBS = ModelLimit(text="max_logprobs, vocab_size", of=lambda info: min(info.max_logprobs, info.vocab_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberLimit:
    """The limits of one number."""

    field: str
    """Its path in a request; `[]` for each element, `{}` for each key of a map, `.length` for how long a value is."""
    least: float = 0
    """The least value. A whole number says that the value is one."""
    most: float = MAX_INT
    """The most on any model."""
    is_above: bool = False
    """True: the value must be above `least`, not only at least."""
    model: ModelLimit | None = None
    """A lower maximum that follows from the model."""
    unit: str = ""
    """Of a length: what is counted. The field then ends with `.length`."""
    note: str = ""
    """What else holds, for people."""

    def most_on(self, info: "ModelInfo") -> float:
        """The most on one model."""
        return self.most if self.model is None else min(self.most, self.model.of(info))


ENTRIES, CHARACTERS, BYTES = "entries", "characters", "bytes"


def _length(
    field: str, unit: str, *, least: int = 0, most: int = MAX_INT, model: ModelLimit | None = None, note: str = ""
) -> NumberLimit:
    return NumberLimit(field=f"{field}.length", unit=unit, least=least, most=most, model=model, note=note)


NUMBERS: tuple[NumberLimit, ...] = (
    NumberLimit(field="prompt.token_ids[]", model=LAST_TOKEN, note="Also for the ids of a text or a chat."),
    NumberLimit(field="sampling.n", least=1, most=MAX_OUTPUTS),
    NumberLimit(
        field="sampling.max_tokens",
        note="0 generates nothing. A larger number than max_model_len leaves room for is lowered to that.",
    ),
    NumberLimit(field="sampling.min_tokens", note="At most max_tokens."),
    NumberLimit(
        field="sampling.temperature",
        least=0.0,
        most=MAX_TEMPERATURE,
        model=ModelLimit(text="max_temperature", of=lambda info: info.max_temperature),
    ),
    NumberLimit(field="sampling.top_p", least=0.0, most=1.0, is_above=True),
    NumberLimit(field="sampling.top_k", note="0, and any number above vocab_size, keep all tokens."),
    NumberLimit(field="sampling.min_p", least=0.0, most=1.0),
    NumberLimit(field="sampling.seed", least=-(2**63), most=2**63 - 1),
    NumberLimit(field="sampling.presence_penalty", least=-2.0, most=2.0),
    NumberLimit(field="sampling.frequency_penalty", least=-2.0, most=2.0),
    NumberLimit(field="sampling.repetition_penalty", least=0.0, most=2.0, is_above=True),
    NumberLimit(field="sampling.logprobs", most=MAX_LOGPROBS, model=MOST_LOGPROBS),
    NumberLimit(field="sampling.prompt_logprobs", most=MAX_LOGPROBS, model=MOST_LOGPROBS),
    NumberLimit(field="sampling.stop_token_ids[]", model=LAST_TOKEN),
    NumberLimit(field="sampling.allowed_token_ids[]", model=LAST_TOKEN),
    NumberLimit(field="sampling.logit_bias{}", model=LAST_TOKEN),
    NumberLimit(field="sampling.logit_bias[]", least=-100.0, most=100.0),
    NumberLimit(field="steering.layers{}", model=LAST_LAYER),
    NumberLimit(field="steering.layers[].operations[].max_relative_change", least=0.0, most=MAX_FLOAT32, is_above=True),
    NumberLimit(field="capture.layers[]", model=LAST_LAYER),
    NumberLimit(field="capture.max_chunk_bytes", least=1 << 12, most=1 << 20),
    NumberLimit(field="priority", least=-MAX_INT - 1, note="Only if the scheduling policy is priority."),
    NumberLimit(field="stream_interval", least=0, note="0: all tokens of an output at its end."),
    NumberLimit(
        field="truncate_prompt_tokens",
        least=1,
        model=MODEL_LENGTH,
        note="Or as many as fit: -1 in Python, 0 in the contract.",
    ),
    NumberLimit(
        field="time_budget",
        least=0.0,
        most=MAX_TIME_BUDGET_S,
        is_above=True,
        note="Seconds; `time_budget_s` in Python.",
    ),
    NumberLimit(
        field="positions.ranges[].first",
        least=-MAX_INT,
        most=MAX_INT - 1,
        note="Within prompt tokens + max_tokens - 1. Negative ones count from the prompt's end.",
    ),
    NumberLimit(field="positions.ranges[].last", least=-MAX_INT, most=MAX_INT - 1, note="As first, and not before it."),
    NumberLimit(
        field="positions.generated_ranges[].first",
        most=MAX_INT - 1,
        note="0 is the first generated token; a range may exceed the request.",
    ),
    NumberLimit(field="positions.generated_ranges[].last", most=MAX_INT - 1, note="Not before first."),
    NumberLimit(
        field="positions.messages[]",
        least=-MAX_MESSAGES,
        most=MAX_MESSAGES - 1,
        note="A message of the chat; -1 is the last one.",
    ),
)
"""Every number that has a range. Vectors, scales and bounds of operations must be finite in the model's dtype."""

LENGTHS: tuple[NumberLimit, ...] = (
    _length("request_id", CHARACTERS, most=MAX_IDENTIFIER_LENGTH, note="A-Z a-z 0-9 . _ : -"),
    _length("model", CHARACTERS, most=MAX_NAME_LENGTH),
    _length("cache_salt", CHARACTERS, most=MAX_NAME_LENGTH),
    _length("prompt.text", CHARACTERS, least=1, note="Its tokens as those of token_ids."),
    _length(
        "prompt.token_ids",
        ENTRIES,
        least=1,
        model=LONGEST_PROMPT,
        note="At most max_model_len - 1 unless max_tokens is 0. Also for the tokens of a text or a chat.",
    ),
    _length("prompt.messages", ENTRIES, least=1, most=MAX_MESSAGES),
    _length("prompt.messages[].role", CHARACTERS, least=1, most=MAX_ROLE_LENGTH),
    _length("prompt.messages[].name", CHARACTERS, most=MAX_CALL_NAME_LENGTH),
    _length("prompt.messages[].tool_call_id", CHARACTERS, most=MAX_CALL_NAME_LENGTH),
    _length(
        "prompt.messages[].tool_calls", ENTRIES, most=MAX_TOOL_CALLS, note="At most 1024 in all messages together."
    ),
    _length("prompt.messages[].tool_calls[].id", CHARACTERS, most=MAX_CALL_NAME_LENGTH),
    _length("prompt.messages[].tool_calls[].name", CHARACTERS, least=1, most=MAX_CALL_NAME_LENGTH),
    _length("prompt.chat_template_kwargs", BYTES, most=MAX_TEMPLATE_KWARGS_BYTES, note="A JSON object."),
    _length("prompt.tools", ENTRIES, most=MAX_TOOLS),
    _length(
        "prompt.tools[]",
        BYTES,
        most=MAX_TOOL_BYTES,
        note="A JSON object. At most 2^20 in a request to a server, with the arguments of tool calls.",
    ),
    _length("sampling.stop", ENTRIES, most=MAX_STOP_STRINGS),
    _length("sampling.stop[]", CHARACTERS, least=1, most=MAX_STOP_LENGTH),
    _length("sampling.stop_token_ids", ENTRIES, most=MAX_STOP_TOKEN_IDS),
    _length("sampling.logit_bias", ENTRIES, most=MAX_LOGIT_BIAS),
    _length("sampling.bad_words", ENTRIES, most=MAX_BAD_WORDS, note=f"At most {MAX_BAD_WORD_TOKENS} tokens together."),
    _length("sampling.bad_words[]", CHARACTERS, least=1, most=MAX_BAD_WORD_LENGTH),
    _length(
        "sampling.allowed_token_ids",
        ENTRIES,
        least=1,
        most=MAX_ALLOWED_TOKEN_IDS,
        note="In the contract, an empty list allows all tokens.",
    ),
    _length("sampling.structured_outputs.json", BYTES, most=MAX_CONSTRAINT_BYTES, note="64 levels."),
    _length("sampling.structured_outputs.regex", BYTES, least=1, most=MAX_REGEX_BYTES),
    _length("sampling.structured_outputs.grammar", BYTES, least=1, most=MAX_CONSTRAINT_BYTES),
    _length(
        "sampling.structured_outputs.choice",
        ENTRIES,
        least=1,
        most=MAX_CHOICES,
        note="Together at most 2^16 bytes; none is empty.",
    ),
    _length(
        "steering.layers",
        ENTRIES,
        most=MAX_LAYERS,
        model=ModelLimit(text="layer_count", of=lambda info: info.layer_count),
    ),
    _length(
        "steering.layers[].operations",
        ENTRIES,
        model=ModelLimit(text="max_operations_per_layer", of=lambda info: info.max_operations_per_layer),
        note="At most max_operations of all layers together.",
    ),
    _length(
        "steering.layers[].operations[].vector",
        ENTRIES,
        least=1,
        model=ModelLimit(text="hidden_size", of=lambda info: info.hidden_size),
        note="Exactly hidden_size.",
    ),
    _length("steering.layers[].operations[].positions", "scopes", most=MAX_SCOPES, note="Different ones in one spec."),
    _length("capture.layers", ENTRIES, most=MAX_LAYERS, note="Each counts once."),
    _length("capture.release_token", BYTES, least=16, most=64, note="Or none."),
    _length("positions.ranges", ENTRIES, most=MAX_RANGES),
    _length("positions.generated_ranges", ENTRIES, most=MAX_RANGES),
    _length("positions.messages", ENTRIES, most=MAX_NAMED_MESSAGES),
    _length("positions.roles", ENTRIES, most=MAX_NAMED_ROLES),
    _length("positions.roles[]", CHARACTERS, least=1, most=MAX_ROLE_LENGTH),
    _length(
        "steering.positions.entries",
        ENTRIES,
        most=MAX_POSITION_ENTRIES,
        note="Ranges, messages and roles in the positions of the spec and of all operations, each as often as given.",
    ),
    _length(
        "positions",
        "parts",
        most=MAX_SPANS_OF_SCOPE,
        note="Parts of the sequence, once messages and special tokens are known. At most 2^15 in a spec.",
    ),
    _length("detokenize.token_ids", ENTRIES, model=MODEL_LENGTH),
)
"""Every list and every text that has a limit of its own; `max_message_bytes` limits all of a request to a server."""

LIMITS: tuple[NumberLimit, ...] = NUMBERS + LENGTHS

SAMPLING_LIMITS: Mapping[str, NumberLimit] = {
    limit.field.removeprefix("sampling."): limit for limit in LIMITS if limit.field.startswith("sampling.")
}
"""Field of SamplingOptions -> its limits."""

MODEL_SAMPLING_LIMITS: Mapping[str, NumberLimit] = {
    name: limit for name, limit in SAMPLING_LIMITS.items() if limit.model is not None and name.isidentifier()
}
"""Those of single numbers that follow from the model."""


def numbers_as_markdown() -> str:
    """The table of the numbers for the documentation."""
    lines = ["| number | least | most | most on a model | also |", "|---|---|---|---|---|"]
    lines += [f"| `{limit.field}` | {_cells(limit)} |" for limit in NUMBERS]
    return "\n".join(lines)


def lengths_as_markdown() -> str:
    """The table of the lists and texts for the documentation."""
    lines = ["| list or text | counted in | least | most | most on a model | also |", "|---|---|---|---|---|---|"]
    lines += [f"| `{limit.field.removesuffix('.length')}` | {limit.unit} | {_cells(limit)} |" for limit in LENGTHS]
    return "\n".join(lines)


def _cells(limit: NumberLimit) -> str:
    least = f"above {limit.least:g}" if limit.is_above else _shown(limit.least)
    most = "" if limit.unit and limit.most == MAX_INT else _shown(limit.most)
    return " | ".join([least, most, limit.model.text if limit.model is not None else "", limit.note])


def _shown(number: float) -> str:
    names: dict[float, str] = {
        MAX_INT: "2^31 - 1",
        MAX_INT - 1: "2^31 - 2",
        2**63 - 1: "2^63 - 1",
        -(2**63): "-2^63",
        -MAX_INT - 1: "-2^31",
        -MAX_INT: "-2^31 + 1",
        1 << 16: "2^16",
        1 << 20: "2^20",
    }
    return names.get(number, f"{number:g}")
