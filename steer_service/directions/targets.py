"""Target texts: steering is trained towards them, and its effect is measured on them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.directions.contrast import ContrastPair
from steer_service.runtime.scoring import with_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A text and the prompt that it follows."""

    prompt: Prompt
    """The prompt; a chat ends before the response."""
    text: str
    """The text, at least one character. Spaces count, and no end is added."""

    def __post_init__(self) -> None:
        if not self.text:
            raise InvalidRequest("the target is empty", reason="EMPTY_TARGET", field="text")

    @property
    def whole(self) -> Prompt:
        """Prompt and text as one prompt. Raises InvalidRequest for a prompt of token ids, which has no text."""
        return with_answer(self.prompt, self.text)


def targets_of(pairs: Iterable[ContrastPair]) -> list[Target]:
    """The targets in contrastive prompts: the text of the positive prompt after the part that both share.

    For chats it is the last response; for texts it is what follows the common first words. Raises InvalidRequest, with
    the number of the pair from 0, for a chat without a response, for texts without a common first word, and for a
    positive text that ends with the common words.
    """
    targets = []
    for index, pair in enumerate(pairs):
        with within(f"pairs[{index}]"):
            targets.append(_target_of(pair))
    return targets


def _target_of(pair: ContrastPair) -> Target:
    match pair.positive, pair.negative:
        case ChatPrompt() as chat, _:
            return _response_of(chat)
        case TextPrompt() as positive, TextPrompt(text=negative):
            return _rest_of(positive, negative)
    raise InvalidRequest("one side is text and the other is not", reason="NO_TARGET", field="negative")


def _response_of(chat: ChatPrompt) -> Target:
    *before, last = chat.messages
    if last.role != "assistant" or not before:
        raise InvalidRequest(
            f"a target needs a question and an assistant's response; the last of {len(chat.messages)} messages is the "
            f"{last.role}'s",
            reason="NO_TARGET",
            field="positive",
        )
    prompt = replace(chat, messages=tuple(before), continue_final_message=False, add_generation_prompt=None)
    return Target(prompt=prompt, text=last.content)


def _rest_of(prompt: TextPrompt, negative: str) -> Target:
    positive = prompt.text
    shared = _beginning_in_common(positive, negative)
    # Cut before a space: tokens begin with it, so that prompt and target have those of the whole text.
    cut = max(shared.rfind(" "), 0)
    if not shared[:cut].strip() or shared == positive:
        raise InvalidRequest(
            "expected texts that begin with the same words and then differ", reason="NO_TARGET", field="positive"
        )
    return Target(prompt=replace(prompt, text=positive[:cut]), text=positive[cut:])


def _beginning_in_common(left: str, right: str) -> str:
    length = next(
        (index for index, (one, other) in enumerate(zip(left, right, strict=False)) if one != other),
        min(len(left), len(right)),
    )
    return left[:length]
