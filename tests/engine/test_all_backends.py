"""The same requests through transformers, the engine, and a client and a server around the engine, in float32."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import DeadlineExceeded
from steer_service.core.events import Completed, OutputFinished, TokenDelta, TokenLogprob
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import Generation
from steer_service.runtime.stream_events import OutputCaptured
from tests.engine.all_backends import (
    BACKENDS,
    GREEDY,
    TEXT,
    AllBackends,
    all_backends_on,
    requests_for,
    run,
    same_receipt,
    texts_for,
)
from tests.engine.oracle import relative_error
from tests.runtime.tokenizers_for_text import text_of_bytes
from tests.tiny_models import LAYERS, ModelFolder

pytestmark = pytest.mark.engine

STATES = 1e-5
"""Of each row, relative to its norm, in float32."""
STATES_OF_THE_BUNDLED_MODEL = 2e-5
"""Its 30 layers add up transformers' own roundings: one row is 1.1e-5 from float64 there, and 4.5e-6 in the engine."""
LOGPROBS = 1e-4
SURE_RANKS, RANKS = 100, 2
"""Ranks that rounding leaves alone, and the places by which it moves others, which are close together."""
MODELS = ["llama", *(pytest.param(name, marks=pytest.mark.extended) for name in ("qwen3", "gemma3", "bundled"))]


@pytest.fixture(scope="module", params=MODELS)
def all_backends(request: pytest.FixtureRequest, model_folder: ModelFolder) -> Iterator[AllBackends]:
    running = request.getfixturevalue("llama") if request.param == "llama" else None
    with all_backends_on(request.param, model_folder, "float32", running) as all_backends:
        yield all_backends


async def test_all_backends_give_the_same_response(all_backends: AllBackends) -> None:
    requests = requests_for(all_backends)
    async with all_backends.backends() as backends:
        answers = {
            name: await asyncio.gather(*[run(backend, request) for request in requests.values()])
            for name, backend in backends.items()
        }
    tolerance = STATES if all_backends.hf.layer_count == LAYERS else STATES_OF_THE_BUNDLED_MODEL
    for index, name in enumerate(requests):
        want = answers["hf"][index]
        for backend in BACKENDS[1:]:
            same_answer(answers[backend][index], want, tolerance, f"{name}, {backend}")
    chats = [answers["hf"][index] for index, one in enumerate(requests.values()) if isinstance(one.prompt, ChatPrompt)]
    assert len({answer.prompt_token_ids for answer in chats}) == len(chats)  # the options of chats did something
    assert all(answer.message_boundaries for answer in chats)
    differ = {
        tuple(answer.outputs[0].captures[max(answer.outputs[0].captures)].ravel()[-8:]) for answer in answers["hf"]
    }
    assert len(differ) >= 8  # the steering did something
    reports = [answer.outputs[0].receipt.changes for answer in answers["hf"] if answer.outputs[0].receipt.changes]
    assert len(reports) == 2
    assert all(0 < change.mean <= change.largest for report in reports for change in report)
    assert sum(change.capped_positions for change in reports[0]) > 0


async def test_all_backends_give_the_same_text(all_backends: AllBackends) -> None:
    requests = texts_for(all_backends)
    async with all_backends.backends() as backends:
        answers = {
            name: await asyncio.gather(*[run(backend, request) for request in requests.values()])
            for name, backend in backends.items()
        }
    for index, (name, request) in enumerate(requests.items()):
        want = answers["hf"][index]
        for backend in BACKENDS[1:]:
            same_answer(answers[backend][index], want, STATES, f"{name}, {backend}")
        for output in want.outputs:
            if output.stop is None and request.sampling.skip_special_tokens is None:
                prompt, tokenizer = want.prompt_token_ids, all_backends.hf.tokenizer
                assert output.text == text_of_bytes(tokenizer, prompt, output.token_ids, True), name
    first = [answer.outputs[0] for answer in answers["hf"]]
    ends = {name: (output.text, output.stop) for name, output in zip(requests, first, strict=True)}
    assert ends["a character that is finished"] == ("", None)
    assert ends["n outputs"] == ("", None)
    assert ends["a stop string of three tokens"] == ("", "bbb")
    assert ends["with the stop string"] == ("bbb", "bbb")
    assert ends["not before the fourth token"] == ("bb", "bb")


async def test_lists_for_a_list_of_prompts_and_events_are_alike_on_all_backends(all_backends: AllBackends) -> None:
    spec = requests_for(all_backends)["add"].steering
    lists = {
        "sampling": [replace(GREEDY, n=2), GREEDY],
        "steering_spec": [spec, None],
        "capture": [None, CaptureSpec(layers=(1, 2))],
        "request_id": ["one", "two"],
    }
    async with all_backends.backends() as backends:
        answers = {
            name: await backend.generate([TEXT, TEXT], **lists, raw_output=True, timeout_s=300)
            for name, backend in backends.items()
        }
        events = {
            name: [
                event async for event in backend.stream_events(TEXT, GREEDY, capture_layers=[1, 2], steering_spec=spec)
            ]
            for name, backend in backends.items()
        }
        rows = {
            name: [await event.handle.fetch() for event in events[name] if isinstance(event, OutputCaptured)]
            for name in events
        }
    want = answers["hf"].generations
    for name, (generations, handles) in answers.items():
        assert [handle.layer_indices for handle in handles] == [(), (), (1, 2)], name
        assert [generation.request_id for generation in generations] == ["one", "two"], name
        for got, expected in zip(generations, want, strict=True):
            same_answer(got, expected, STATES_OF_THE_BUNDLED_MODEL, name)
    assert {type(event).__name__ for event in events["hf"]} == {
        "Started",
        "TokenDelta",
        "OutputCaptured",
        "OutputFinished",
        "Completed",
    }
    for name in BACKENDS:
        assert [type(event) for event in events[name][-3:]] == [OutputCaptured, OutputFinished, Completed], name
        same_receipt(events[name][-2].receipt, events["hf"][-2].receipt, name)
        for layer in (1, 2):
            got, expected = (one[layer][0]["hidden"] for one in (*rows[name], *rows["hf"]))
            assert relative_error(got, expected) <= STATES_OF_THE_BUNDLED_MODEL, (name, layer)


def test_the_engine_has_synchronous_streams(llama: VLLMSteeringModel) -> None:
    asked = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
    events = list(llama.stream_events_sync(TEXT, capture_layers=1, timeout_s=300, **asked))

    [handle] = [event.handle for event in events if isinstance(event, OutputCaptured)]
    assert len(handle.matrix(1)) == len(events[0].prompt_token_ids) + 2
    texts = [event.text for event in events if isinstance(event, TokenDelta)]
    assert "".join(llama.stream_sync(TEXT, **asked)) == "".join(texts)


async def test_as_many_tokens_are_kept_as_each_backend_takes(all_backends: AllBackends) -> None:
    token_ids = tuple(number % 3000 + 100 for number in range(10_000))
    async with all_backends.backends() as backends:
        for name, backend in backends.items():
            most = (await backend.load_info()).max_model_len
            kept = await backend.render(token_ids, truncate_prompt_tokens=-1)
            assert kept.token_ids == token_ids[-most:], name
            if most <= 1024:  # of the tiny models
                [one], _ = await backend.generate(
                    [token_ids], GREEDY, truncate_prompt_tokens=-1, raw_output=True, timeout_s=300
                )
                assert one.prompt_token_ids == token_ids[1 - most :], name
                assert len(one.outputs[0].token_ids) == 1, name


async def test_pieces_are_as_long_as_asked_on_all_backends(all_backends: AllBackends) -> None:
    async with all_backends.backends() as backends:
        for name, backend in backends.items():
            sizes, in_one = [
                [
                    len(event.token_ids)
                    async for event in backend.stream_events(TEXT, GREEDY, stream_interval=interval, timeout_s=300)
                    if isinstance(event, TokenDelta)
                ]
                for interval in (3, 0)
            ]
            assert in_one == [GREEDY.max_tokens], name
            assert sizes[0] == 1, name
            assert min(sizes[1:-1]) >= 3, name
            assert sum(sizes) == GREEDY.max_tokens, name


async def test_a_timeout_ends_a_call_and_the_engine_serves_the_next(llama: VLLMSteeringModel) -> None:
    with pytest.raises(DeadlineExceeded):
        await llama.generate([TEXT] * 40, max_tokens=400, ignore_eos=True, capture_layers=[1], timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        llama.generate_sync([TEXT] * 40, max_tokens=400, ignore_eos=True, timeout_s=0.05)
    texts, _ = await llama.generate([TEXT] * 40, max_tokens=1, timeout_s=300)
    assert len(texts) == 40


async def test_all_backends_show_prompts_as_requests_have_them(all_backends: AllBackends) -> None:
    chat = requests_for(all_backends)["a chat"].prompt
    assert isinstance(chat, ChatPrompt)
    beginning = replace(chat, messages=(*chat.messages, ChatMessage(role="assistant", content="By the 視𠜎")))
    prompts = [
        TextPrompt(text="By the 視𠜎"),
        TextPrompt(text="By the sea", add_special_tokens=False),
        TextPrompt(text="By the sea, " * 90),
        TokenPrompt(token_ids=(5, 6)),
        chat,
        replace(beginning, continue_final_message=True),
    ]
    one = SamplingOptions(max_tokens=1)
    requests = [GenerateRequest(prompt=prompt, sampling=one, capture=CaptureSpec(layers=(0,))) for prompt in prompts]
    async with all_backends.backends() as backends:
        for prompt, request in zip(prompts, requests, strict=True):
            cut = {await backend.render(prompt, truncate_prompt_tokens=2) for backend in backends.values()}
            assert [len(one.token_ids) for one in cut] == [2], prompt
            shown = {name: await backend.render(prompt) for name, backend in backends.items()}
            assert len(set(shown.values())) == 1, prompt
            tokens = shown["hf"]
            for backend in backends.values():
                generation = await run(backend, request)
                assert generation.prompt_token_ids == tokens.token_ids, prompt
                assert generation.message_boundaries == tokens.message_boundaries, prompt
                assert await backend.detokenize(tokens.token_ids) == await backends["hf"].detokenize(tokens.token_ids)
            assert tokens.text.endswith(tokens.prefill)
            assert bool(tokens.message_boundaries) is isinstance(prompt, ChatPrompt)
            if tokens.offsets is not None:
                assert tokens.text[tokens.offsets[-1][0] : tokens.offsets[-1][1]] in tokens.text
                assert [*tokens.offsets] == sorted(tokens.offsets)


def same_answer(got: Generation, want: Generation, tolerance: float, about: str) -> None:
    assert got.prompt_token_ids == want.prompt_token_ids, about
    assert got.message_boundaries == want.message_boundaries, about
    assert got.sampling == want.sampling, about
    same_logprobs(got.prompt_logprobs[1:], want.prompt_logprobs[1:], about)
    for mine, theirs in zip(got.outputs, want.outputs, strict=True):
        assert mine.token_ids == theirs.token_ids, about
        assert (mine.text, mine.finish_reason, mine.stop) == (theirs.text, theirs.finish_reason, theirs.stop), about
        same_logprobs(mine.logprobs, theirs.logprobs, about)
        assert mine.labels == theirs.labels, about
        same_receipt(mine.receipt, theirs.receipt, about)
        assert (mine.captured.spans, mine.captured.pooling) == (theirs.captured.spans, theirs.captured.pooling), about
        for part in ("before", "after"):
            rows, other = getattr(mine.captured, part), getattr(theirs.captured, part)
            assert rows.keys() == other.keys(), about
            for layer in rows:
                assert rows[layer].dtype == other[layer].dtype, about
                assert relative_error(rows[layer], other[layer]) <= tolerance, (about, part, layer)


def same_logprobs(got: Sequence[TokenLogprob], want: Sequence[TokenLogprob], about: str) -> None:
    assert [entry.token_id for entry in got] == [entry.token_id for entry in want], about
    for mine, theirs in zip(got, want, strict=True):
        assert abs(mine.logprob - theirs.logprob) <= LOGPROBS, about
        assert mine.text == theirs.text, about
        assert abs(mine.rank - theirs.rank) <= (RANKS if theirs.rank > SURE_RANKS else 0), about
        assert [one.rank for one in mine.top] == [one.rank for one in theirs.top], about
        likely, others = ({one.token_id: one.logprob for one in entry.top} for entry in (mine, theirs))
        assert len(mine.top) == len(theirs.top), about
        assert all(abs(likely[token] - others[token]) <= LOGPROBS for token in likely.keys() & others.keys()), about
        assert np.allclose([*likely.values()], [*others.values()], atol=LOGPROBS), about  # ties may change places


async def test_all_backends_know_what_the_tokenizer_tells(all_backends: AllBackends) -> None:
    async with all_backends.backends() as backends:
        # In a thread: a client's first use of `info` blocks, and its server runs in this event loop.
        infos = [await asyncio.to_thread(lambda one: one.info, one) for one in backends.values()]

    assert infos[0].special_token_ids
    assert [info.special_token_ids for info in infos] == [infos[0].special_token_ids] * len(BACKENDS)
    assert [info.has_chat_template for info in infos] == [True] * len(BACKENDS)
