"""Prompts as the model gets them, for callers that choose positions before they send a request."""

from dataclasses import dataclass

from steer_service.core.capture import MessageBoundary
from steer_service.core.field_checks import check_kind, check_name, check_token_ids
from steer_service.core.one_line import one_line
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.request import kept_tokens_from


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """A prompt to show as the model gets it."""

    prompt: Prompt
    """Text, token ids or a conversation."""
    model: str = ""
    """Name of the model or LoRA adapter; empty: the loaded model."""
    with_token_texts: bool = True
    """True: with the text of each token."""
    with_offsets: bool = True
    """True: with the place of each token in the text, if the tokenizer knows it."""
    truncate_prompt_tokens: int | None = None
    """As in GenerateRequest; -1 keeps `max_prompt_tokens` of the model."""

    def __post_init__(self) -> None:
        check_kind(self.prompt, (TextPrompt, TokenPrompt, ChatPrompt), "prompt")
        check_name(self.model, "model")
        for name in ("with_token_texts", "with_offsets"):
            check_kind(getattr(self, name), bool, name)
        object.__setattr__(self, "truncate_prompt_tokens", kept_tokens_from(self.truncate_prompt_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeRequest:
    """Tokens to convert to text."""

    token_ids: tuple[int, ...]
    """Ids of the model's vocabulary; may be empty."""
    skip_special_tokens: bool = False
    """True: special tokens do not appear in the text."""
    model: str = ""
    """Name of the model or LoRA adapter; empty: the loaded model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", check_token_ids(self.token_ids, "token_ids"))
        check_kind(self.skip_special_tokens, bool, "skip_special_tokens")
        check_name(self.model, "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """A prompt as the model gets it. The index of a token is its position."""

    text: str
    """What the chat template writes, or the text itself.

    For token ids, for tokenizers that write chats without a template, and with `truncate_prompt_tokens`, it is the text
    of the tokens."""
    token_ids: tuple[int, ...]
    """The ids that `generate` gives to the model."""
    token_texts: tuple[str, ...] | None = None
    """Text of each token alone, special tokens too, with U+FFFD for bytes that are no character; None if not asked for.

    Empty for an id that the tokenizer does not have."""
    offsets: tuple[tuple[int, int], ...] | None = None
    """Place of each token in `text`: its first character and the one after its last, as Python counts them.

    Tokens that share a character have the same place; tokens that are not from the text, such as BOS, have (0, 0). None
    if not asked for, for token ids, with `truncate_prompt_tokens`, and if the tokenizer does not know the places:
    Mistral's, and tokenizers in Python.
    """
    special_positions: tuple[int, ...] = ()
    """Positions of special tokens, ascending."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """Positions of each message of a chat; empty for other prompts, and where they are not known."""
    boundaries_missing_reason: str = ""
    """Why a chat has no boundaries, a sentence; "" if it has them."""
    prefill: str = ""
    """Beginning of the response, with which `text` ends; empty unless the chat continues its last message.

    Of a prompt that was cut within it, only the rest."""

    __repr__ = one_line
