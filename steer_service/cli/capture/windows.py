"""Texts that are longer than one request may be: cut to their beginning, or to windows that overlap.

With windows of N tokens that begin M tokens apart, every token has one row. The first window captures all of its rows,
each further one those of its last M tokens: the tokens before them are context. So every row after the first window
has the rows of at least N - M tokens before it. If the text begins with a special token, such as BOS, every window
begins with it, as models expect; it has a row in the first window only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import PositionRange, scope_from
from steer_service.core.prompt import ChatPrompt, Prompt, TokenPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection
from steer_service.core.spans import between


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """What becomes of long texts."""

    context: int = 0
    """Tokens of a window; 0: only the beginning is kept, as many tokens as a prompt may have."""
    stride: int = 0
    """Tokens between the beginnings of two windows."""

    def limit(self, model: ModelInfo) -> int:
        """Tokens of the longest text that is not cut."""
        return self.context or model.max_prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of a text."""

    number: int
    """Which one, from 0."""
    start: int
    """Position in the text of its first token, without the special token that is put before it."""
    end: int
    """Position after that of its last token."""
    first: int
    """Position of the first token whose row it captures."""
    prefix: tuple[int, ...] = ()
    """The special token with which the text begins, in windows after the first."""

    @property
    def offset(self) -> int:
        """Position in the text minus position in the window."""
        return self.start - len(self.prefix)

    def request(self, request: GenerateRequest, tokens: tuple[int, ...]) -> GenerateRequest:
        """The request for this window of a text of these tokens."""
        return replace(request, prompt=TokenPrompt(token_ids=(*self.prefix, *tokens[self.start : self.end])))


def beginning(limit: int) -> Window:
    """The window that is the beginning of a text."""
    return Window(number=0, start=0, end=limit, first=0)


def windows_of(count: int, cutting: Cutting, prefix: tuple[int, ...]) -> Iterator[Window]:
    """The windows of a text of `count` tokens. `prefix`: its first token if every window begins with it."""
    yield Window(number=0, start=0, end=min(cutting.context, count), first=0)
    number, end = 1, cutting.context
    while end < count:
        last = min(end + cutting.stride, count)
        start = number * cutting.stride + len(prefix)
        yield Window(number=number, start=start, end=last, first=end, prefix=prefix)
        number, end = number + 1, last


def requests_of(
    request: GenerateRequest, tokens: tuple[int, ...], cutting: Cutting, model: ModelInfo
) -> list[tuple[Window, GenerateRequest]]:
    """Each window of a text of these tokens, with its request; windows without captured rows are left out.

    The positions of `request` are those of the whole text. Raises InvalidRequest if the text does not have them.
    """
    assert request.capture is not None
    if not cutting.context:
        window = beginning(cutting.limit(model))
        return [(window, window.request(request, tokens))]
    places = PromptPlaces(token_ids=tokens, special_token_ids=model.special_token_ids)
    captured = RowSelection.of(request, len(tokens), len(tokens), places).captured
    prefix = tokens[:1] if tokens[0] in model.special_token_ids else ()
    made = []
    for window in windows_of(len(tokens), cutting, prefix):
        spans = between(captured, window.first, window.end)
        if spans:
            ranges = [PositionRange(first - window.offset, end - 1 - window.offset) for first, end in spans]
            capture: CaptureSpec = replace(request.capture, positions=scope_from(ranges))
            made.append((window, window.request(replace(request, capture=capture), tokens)))
    return made


def advice_for(request: GenerateRequest, model: ModelInfo) -> str:
    """What to do about a prompt that is too long for requests like `request`."""
    is_rows_only = request.sampling.is_rows_only
    most = f"the longest prompt has {model.most_prompt_tokens(is_rows_only=is_rows_only)} tokens"
    if not is_rows_only:
        return f"{most}: --truncate-prompt-tokens K captures the end of longer ones"
    return (
        f"{most}: of longer ones --truncate captures the beginning, --truncate-prompt-tokens K the end, and "
        "--context N --stride M all, in windows"
    )


def check_can_be_cut(prompt: Prompt) -> None:
    """Raises InvalidRequest for a chat: its messages belong together."""
    if isinstance(prompt, ChatPrompt):
        raise InvalidRequest(
            "a chat that is too long is not cut to its beginning or to windows; --truncate-prompt-tokens keeps its end",
            reason="PROMPT_TOO_LONG",
            field="prompt",
        )
