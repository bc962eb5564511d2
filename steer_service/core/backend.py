"""The interface of every backend, which turns a request into events, and the facts about its model."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from steer_service.core.events import Event
from steer_service.core.number_limits import DEFAULT_MAX_LOGPROBS, MAX_TEMPERATURE
from steer_service.core.one_line import one_line
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.core.start_proof import StartProof
from steer_service.core.usage import BackendUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts about the loaded model against which requests are checked."""

    name: str
    """The name under which it is served."""
    architecture: str
    """Class name of the model, such as `LlamaForCausalLM`."""
    layer_count: int
    """Decoder layers; their indices are 0..layer_count - 1."""
    hidden_size: int
    """Elements of one position of the residual stream."""
    vocab_size: int
    """Token ids are 0..vocab_size - 1."""
    max_model_len: int
    """Tokens of prompt and output together at most."""
    dtype: str
    """Dtype of the residual stream: `float32`, `float16` or `bfloat16`."""
    max_programs: int
    """Distinct steering programs that can be in use at once; more wait."""
    max_operations: int
    """Operations one program may hold, all layers together."""
    max_operations_per_layer: int
    """Operations one program may hold at one layer."""
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    """Log-probabilities of likeliest tokens that the engine returns at most; never more than `vocab_size`."""
    max_temperature: float = MAX_TEMPERATURE
    """The highest temperature that the engine accepts."""
    adapters: tuple[str, ...] = ()
    """Names of its LoRA adapters; a request chooses one as its `model`."""
    aliases: tuple[str, ...] = ()
    """Further names of the model itself."""
    has_chat_template: bool = False
    """True if it serves chats: its tokenizer has a template or writes chats itself, or it was given a template."""
    special_token_ids: tuple[int, ...] = ()
    """Special tokens of its tokenizer that the model has, ascending; empty if there is none, or none is known."""
    max_prompt_tokens: int = 0
    """Tokens of a prompt at most if nothing is generated; never more than `max_model_len`, which is the default. An
    engine at the model's own maximum length takes one token less."""

    __repr__ = one_line

    def __post_init__(self) -> None:
        most = min(self.max_prompt_tokens or self.max_model_len, self.max_model_len)  # an older server does not say
        object.__setattr__(self, "max_prompt_tokens", most)

    def most_prompt_tokens(self, *, is_rows_only: bool) -> int:
        """Tokens of a prompt at most: one of `max_model_len` is left for the output unless nothing is generated."""
        return self.max_prompt_tokens if is_rows_only else min(self.max_prompt_tokens, self.max_model_len - 1)


class Backend(Protocol):
    """Serves requests: the engine and the transformers model in this process, the client, and the fake of the tests."""

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        ...

    @property
    def is_alive(self) -> bool:
        """False once the backend cannot recover: every request fails from then on."""
        ...

    @property
    def requests_at_once(self) -> int:
        """Requests that it computes at once, while others wait; 0 if it has no such limit."""
        ...

    @property
    def has_priority(self) -> bool:
        """True if requests may have a priority."""
        ...

    @property
    def has_structured_outputs(self) -> bool:
        """True if requests may have structured outputs."""
        ...

    @property
    def start_proof(self) -> StartProof | None:
        """What it proved about itself when it started; None if it proves nothing."""
        ...

    @property
    def usage(self) -> BackendUsage | None:
        """How much of its limits it uses now; None if it has none. May be read in any thread."""
        ...

    def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of one request, in the order that `core.events` gives.

        Raises a SteerError before the first event if the request is wrong. Closing the generator (`aclose`) aborts
        the request and frees everything it holds; there is no other way to cancel.
        """
        ...

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """The tokens of a prompt, those that `submit` gives to the model; raises the SteerErrors of such a prompt."""
        ...

    async def text_of(self, request: DetokenizeRequest) -> str:
        """The text of tokens; raises InvalidRequest for ids that the model does not have, or too many."""
        ...

    async def close(self) -> None:
        """Ends everything; the backend is unusable afterwards. Calling it again does nothing."""
        ...
