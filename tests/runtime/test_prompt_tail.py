"""Prompts that are cut to their last tokens, with the meaning of vLLM's `truncate_prompt_tokens`."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer
from vllm.renderers.params import TokenizeParams

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.runtime.prepare import prepare
from steer_service.runtime.prompt_length import TokenizerFacts
from steer_service.runtime.prompt_renderer import PromptRenderer
from steer_service.runtime.prompt_tail import PromptTail
from steer_service.runtime.prompts import TOO_LONG, RenderedPrompt
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.runtime.chat_templates import CHATML, tokenizer_with

INFO = replace(FAKE_MODEL, max_model_len=64, vocab_size=60_000)


def with_bos_and_eos() -> Any:
    tokenizer = tokenizer_with(CHATML)
    backend = tokenizer.backend_tokenizer
    ids = [(token, backend.token_to_id(token)) for token in ("<|begin|>", "<|im_end|>")]
    backend.post_processor = processors.TemplateProcessing("<|begin|> $A <|im_end|>", special_tokens=ids)
    return tokenizer


@pytest.fixture(scope="module")
def bundled() -> Any:
    return AutoTokenizer.from_pretrained(ensure_bundled_model())


@pytest.fixture(scope="module")
def facts(bundled: Any) -> TokenizerFacts:
    return TokenizerFacts.of(bundled)


async def rendered(tokenizer: Any, prompt: Prompt, keep: int, **sampling: Any) -> RenderedPrompt:
    request = GenerateRequest(
        prompt=prompt,
        capture=CaptureSpec(layers=(0,)),
        truncate_prompt_tokens=keep,
        sampling=SamplingOptions(**sampling),
    )
    return (await prepare(request, INFO, PromptRenderer(tokenizer, INFO).render)).prompt


@pytest.mark.parametrize("make", [with_bos_and_eos, lambda: tokenizer_with(None)], ids=["with", "without"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("keep", [3, 5, 10, 11, 60])
async def test_a_text_is_cut_as_vllm_cuts_it(make: Any, add_special_tokens: bool, keep: int) -> None:
    theirs = make()
    theirs.truncation_side = "left"  # vLLM's registry of tokenizers does so for models that generate
    parameters = TokenizeParams(
        max_total_tokens=64, truncate_prompt_tokens=keep, add_special_tokens=add_special_tokens
    ).get_encode_kwargs()

    ours = await rendered(make(), TextPrompt(text="0123456789", add_special_tokens=add_special_tokens), keep)

    assert list(ours.token_ids) == theirs.encode("0123456789", **parameters)


async def test_the_special_tokens_of_a_text_stay() -> None:
    tokenizer = with_bos_and_eos()

    found = await rendered(tokenizer, TextPrompt(text="abcdefgh"), 5)

    assert tokenizer.decode(found.token_ids) == "<|begin|>fgh<|im_end|>"


async def test_special_tokens_alone_are_no_prompt() -> None:
    with pytest.raises(InvalidRequest, match="no place for the text beside 2 special tokens") as refused:
        await rendered(with_bos_and_eos(), TextPrompt(text="abcdefgh"), 2)
    assert (refused.value.field, refused.value.reason) == ("truncate_prompt_tokens", "OUT_OF_RANGE")


async def test_token_ids_are_cut_as_they_are() -> None:
    found = await rendered(with_bos_and_eos(), TokenPrompt(token_ids=tuple(range(200))), 3)
    assert found.token_ids == (197, 198, 199)


async def test_token_ids_that_are_cut_off_need_not_be_the_model_s() -> None:
    token_ids = (INFO.vocab_size, 1, 2, 3)
    found = await rendered(tokenizer_with(None), TokenPrompt(token_ids=token_ids), 3)
    assert found.token_ids == (1, 2, 3)
    with pytest.raises(InvalidRequest, match="outside") as refused:
        await rendered(tokenizer_with(None), TokenPrompt(token_ids=token_ids), 4)
    assert (refused.value.field, refused.value.reason) == ("prompt.token_ids", "BAD_TOKEN")


async def test_as_many_as_fit_leave_room_for_one_token() -> None:
    prompt = TokenPrompt(token_ids=tuple(range(200)))
    assert (await rendered(tokenizer_with(None), prompt, -1)).token_ids == tuple(range(137, 200))
    assert (await rendered(tokenizer_with(None), prompt, -1, max_tokens=0)).token_ids == tuple(range(136, 200))


@pytest.mark.parametrize("keep", [0, -2, 2**31, 1.5, True, "3"])
def test_other_numbers_are_refused(keep: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        GenerateRequest(prompt=TextPrompt(text="a"), truncate_prompt_tokens=keep)
    assert refused.value.field == "truncate_prompt_tokens"


async def test_more_than_the_model_takes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="65 is more than the model's limit of 64 tokens") as refused:
        await rendered(tokenizer_with(None), TextPrompt(text="a"), 65)
    assert refused.value.field == "truncate_prompt_tokens"
    with pytest.raises(InvalidRequest, match="the prompt has 64 tokens"):
        await rendered(tokenizer_with(None), TextPrompt(text="a" * 100), 64)


CHAT = ChatPrompt(messages=[ChatMessage(role="user", content="abcd"), ChatMessage(role="user", content="efgh")])


@pytest.mark.parametrize(
    ("keep", "own"),
    [
        (60, ["abcd", "efgh"]),
        (26, ["d", "efgh"]),
        (25, ["", "efgh"]),
        (15, ["", "gh"]),
        (3, ["", ""]),
    ],
)
async def test_the_messages_of_a_cut_chat_have_the_places_of_their_rests(keep: int, own: list[str]) -> None:
    tokenizer = tokenizer_with(CHATML)
    whole = await PromptRenderer(tokenizer, FAKE_MODEL).render(GenerateRequest(prompt=CHAT))

    found = await rendered(tokenizer, CHAT, keep)

    assert found.token_ids == whole.token_ids[-keep:]
    decode = tokenizer.decode
    assert [decode(found.token_ids[one.start_token : one.end_token]) for one in found.message_boundaries] == own


async def test_a_chat_of_a_slow_tokenizer_is_cut() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML

    found = await rendered(tokenizer, CHAT, 12)

    assert len(found.token_ids) == 12
    assert found.message_boundaries == ()


PIECES = st.sampled_from(
    ["The sea ", "is wide, and ", "\n\n", "42 1000000 ", "  ", "日本 ", "naïve é", "don't", ". ", "\t"]
)


@given(st.lists(PIECES, min_size=1, max_size=40), st.integers(1, 300), st.booleans())
def test_the_end_of_a_long_text_is_that_of_the_whole(
    bundled: Any, facts: TokenizerFacts, pieces: list[str], keep: int, is_chat: bool
) -> None:
    text = "".join(pieces) * (6_000 // len("".join(pieces)) + 1)
    tail = PromptTail(keep, bundled, lambda: facts)

    whole = bundled(text, add_special_tokens=False, return_offsets_mapping=True)

    if is_chat:
        assert tail.of_chat(text, with_offsets=True) == (
            tuple(whole["input_ids"][-keep:]),
            tuple(whole["offset_mapping"][-keep:]),
        )
    else:
        assert tail.of_text(text, add_special_tokens=False) == tuple(whole["input_ids"][-keep:])


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.characters = 0
        self._tokenizer = tokenizer
        self.backend_tokenizer, self.bos_token_id = tokenizer.backend_tokenizer, tokenizer.bos_token_id

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer(text, **options)

    def encode(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer.encode(text, **options)


async def test_only_the_end_of_a_long_text_is_tokenised(bundled: Any) -> None:
    tokenizer = Counting(bundled)

    found = await rendered(tokenizer, TextPrompt(text="The sea is wide and " * 500_000), 50)

    assert len(found.token_ids) == 50
    assert tokenizer.characters < 100_000


@pytest.mark.parametrize(
    "text",
    ["視" * 300_000, "a" * 300_000, "bbbbbba b" + "b" * 8_388_600],
    ids=["no spaces", "letters", "a space at the beginning"],
)
async def test_a_huge_text_without_a_place_to_cut_is_refused(bundled: Any, text: str) -> None:
    tokenizer = Counting(bundled)

    with pytest.raises(InvalidRequest, match="too long to find its last 50 tokens; send its end") as refused:
        await rendered(tokenizer, TextPrompt(text=text), 50)

    assert refused.value.reason == "PROMPT_TOO_LONG"
    assert tokenizer.characters == 0


async def test_messages_of_a_chat_that_is_far_longer_than_what_is_kept_are_not_looked_for() -> None:
    """The marks of a chat of 16 MiB would take a minute."""
    tokenizer = tokenizer_with(CHATML)
    places = []
    for words in (1_000, 70_000):
        chat = ChatPrompt(messages=[ChatMessage(role="user", content="sea " * words)])
        found = await rendered(tokenizer, chat, 50)
        assert len(found.token_ids) == 50
        places.append((len(found.message_boundaries), found.boundaries_missing_reason))

    assert places == [(1, ""), (0, TOO_LONG)]


async def test_positions_of_messages_are_those_in_the_cut_prompt() -> None:
    backend = FakeBackend()
    messages = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c d e"}]

    async def spans(positions: str, keep: int | None) -> Any:
        capture = CaptureSpec(layers=(1,), positions=positions)
        asked: dict[str, Any] = {"capture": capture, "truncate_prompt_tokens": keep, "max_tokens": 0}
        [generation], _ = await backend.chat(messages, raw_output=True, **asked)
        return generation.outputs[0].captured.spans

    assert [await spans("roles[user]", keep) for keep in (None, 7, 3)] == [
        ((1, 3), (4, 7)),
        ((0, 2), (3, 6)),
        ((0, 2),),
    ]
    with pytest.raises(InvalidRequest, match="no token is selected") as refused:
        await spans("messages[0]", 3)
    assert refused.value.field == "capture.positions.messages"
