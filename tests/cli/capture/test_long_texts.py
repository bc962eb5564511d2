"""The tokens of a text in pieces are those of the whole text."""

import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from steer_client import InvalidRequest, PromptTokens, Unsupported
from steer_service.cli.capture.long_texts import tokens_of_text
from steer_service.core.prompt import TextPrompt

SENTENCE = "the sea is calm and a ship sails to the harbour where gulls cry over waves of the tide"
WORDS = SENTENCE.split()


def trained(pre: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A small byte-level BPE tokenizer with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def text(seed: int, length: int) -> str:
    rng = random.Random(seed)
    marks = [" ", " ", " ", ", ", "\n", ". ", "  ", "é ", "🚢 "]
    return "".join(rng.choice(WORDS) + rng.choice(marks) for _ in range(length))


class Server:
    """A server that takes at most `limit` tokens in a call."""

    def __init__(self, tokenizer: Tokenizer, limit: int, *, has_places: bool = True) -> None:
        self.tokenizer, self.limit, self.has_places = tokenizer, limit, has_places
        self.calls = 0

    async def __call__(self, text: str, adds_special: bool) -> PromptTokens:
        self.calls += 1
        found = self.tokenizer.encode(text, add_special_tokens=adds_special)
        if len(found.ids) > self.limit:
            raise InvalidRequest("too long", reason="PROMPT_TOO_LONG")
        places = tuple(found.offsets) if self.has_places else None
        return PromptTokens(text=text, token_ids=tuple(found.ids), offsets=places)


@pytest.mark.parametrize("adds_special", [True, False])
@pytest.mark.parametrize("seed", range(5))
async def test_pieces_give_the_tokens_of_the_whole_text(seed: int, adds_special: bool) -> None:
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False))
    whole = text(seed, 3000)
    server = Server(tokenizer, 256)
    prompt = TextPrompt(text=whole, add_special_tokens=adds_special)
    expected = tuple(tokenizer.encode(whole, add_special_tokens=adds_special).ids)

    assert await tokens_of_text(prompt, server, 256, None) == expected
    assert len(expected) > 3000
    server.calls = 0
    assert await tokens_of_text(prompt, server, 256, 256) == expected[:256]
    assert server.calls < 8


async def test_a_text_that_fits_is_one_call() -> None:
    server = Server(trained(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)), 256)
    ids = await tokens_of_text(TextPrompt(text="the sea is calm"), server, 256, None)
    assert ids == tuple(server.tokenizer.encode("the sea is calm").ids)
    assert server.calls == 1


async def test_a_tokenizer_whose_pieces_do_not_agree_is_refused() -> None:
    class Moody(Server):
        async def __call__(self, text: str, adds_special: bool) -> PromptTokens:
            found = await super().__call__(text, adds_special)
            changed = tuple(token + self.calls for token in found.token_ids)
            return PromptTokens(text=text, token_ids=changed, offsets=found.offsets)

    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False))
    with pytest.raises(Unsupported, match="its pieces do not have the same tokens"):
        await tokens_of_text(TextPrompt(text=text(1, 900)), Moody(tokenizer, 256), 256, None)
    server = Server(tokenizer, 256, has_places=False)
    with pytest.raises(Unsupported, match="does not know the places of its tokens"):
        await tokens_of_text(TextPrompt(text=text(1, 900)), server, 256, None)


async def test_a_tokenizer_whose_next_tokens_differ_is_refused() -> None:
    class Changing(Server):
        """A third of the ids is the same in every piece."""

        async def __call__(self, text: str, adds_special: bool) -> PromptTokens:
            found = await super().__call__(text, adds_special)
            changed = tuple(one if one % 3 == 0 else one + self.calls for one in found.token_ids)
            return PromptTokens(text=text, token_ids=changed, offsets=found.offsets)

    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False))
    with pytest.raises(Unsupported, match="its pieces do not have the same tokens"):
        await tokens_of_text(TextPrompt(text=text(1, 900)), Changing(tokenizer, 256), 256, None)
