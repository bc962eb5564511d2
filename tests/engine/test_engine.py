"""The engine's promises beyond numbers, on real vLLM: prefixes, waiting, outputs, refusals, closing."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, NotFound, Unsupported
from steer_service.core.events import CaptureBlock, FinishReason, TokenDelta
from steer_service.core.prompt import Prompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from tests.engine.closing import close_in_the_middle_of_a_captured_request, leaves_nothing, mapped
from tests.engine.conftest import BLOCK, ENGINE_ARGUMENTS, own_segments
from tests.engine.oracle import Oracle, relative_error
from tests.tiny_models import LAYERS, WIDTH

pytestmark = pytest.mark.engine

ALL_LAYERS = CaptureSpec(layers=range(LAYERS))


def add(seed: int, scale: float = 4.0, layer: int = 1) -> SteeringSpec:
    return SteeringSpec.simple_add(layer, np.random.default_rng(seed).normal(size=WIDTH), scale)


def ask(prompt: Prompt, steering: SteeringSpec | None = None, **options: object) -> GenerateRequest:
    capture = options.pop("capture", None)
    sampling = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "logprobs": 0, **options}
    return GenerateRequest(prompt=prompt, steering=steering, capture=capture, sampling=SamplingOptions(**sampling))


def tokens(start: int, count: int) -> TokenPrompt:
    return TokenPrompt(token_ids=range(start, start + count))


async def run(model: VLLMSteeringModel, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(model, request)), timeout=120)


def logprobs(generation: Generation) -> list[float]:
    return [entry.logprob for entry in generation.outputs[0].logprobs]


class TestPrefixCache:
    PROMPT = 3 * BLOCK + 5

    async def test_steering_never_leaks_through_a_shared_prefix(self, llama, model_folder) -> None:
        """The same prompt, steered, unsteered and steered otherwise: each equals its cold run, and the oracle."""
        oracle = Oracle(model_folder("llama"))
        prompt = tokens(2000, self.PROMPT)
        for turn, spec in enumerate((add(1), None, add(2), add(1), None)):
            generation = await run(llama, ask(prompt, spec))
            cold = await run(llama, replace(ask(prompt, spec), cache_salt=f"cold {turn}"))
            assert cold.usage.cached_tokens == 0
            assert generation.usage.cached_tokens == (0 if turn < 3 else 3 * BLOCK)
            assert generation.outputs[0].token_ids == cold.outputs[0].token_ids
            np.testing.assert_allclose(logprobs(generation), logprobs(cold), atol=1e-5)
            sequence = [*prompt.token_ids, *generation.outputs[0].token_ids]
            np.testing.assert_allclose(logprobs(generation), oracle.logprobs(sequence, spec, self.PROMPT), atol=1e-4)

    async def test_equal_steering_shares_its_prefix_and_the_receipt_reports_it(self, llama) -> None:
        prompt = tokens(3000, self.PROMPT)
        first, second = await run(llama, ask(prompt, add(3))), await run(llama, ask(prompt, add(3)))
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens == 3 * BLOCK
        receipt = second.outputs[0].receipt
        assert receipt.rows_from_prefix_cache == 3 * BLOCK
        assert receipt.rows_steered == receipt.rows_total - 3 * BLOCK
        np.testing.assert_allclose(logprobs(first), logprobs(second), atol=1e-5)

    async def test_other_steering_reuses_nothing(self, llama) -> None:
        prompt = tokens(4000, self.PROMPT)
        for spec in (None, add(4), add(4, scale=4.5), add(4, layer=2)):
            assert (await run(llama, ask(prompt, spec))).usage.cached_tokens == 0

    async def test_a_capture_recomputes_cached_rows(self, llama, model_folder) -> None:
        prompt = tokens(5000, self.PROMPT)
        await run(llama, ask(prompt))
        assert (await run(llama, ask(prompt))).usage.cached_tokens > 0
        captured = await run(llama, ask(prompt, capture=ALL_LAYERS))
        assert captured.usage.cached_tokens == 0
        want = Oracle(model_folder("llama")).streams([*prompt.token_ids, *captured.outputs[0].token_ids][:-1], None)
        for layer in range(LAYERS):
            assert relative_error(captured.outputs[0].captures[layer], want[layer]) <= 1e-5

    async def test_a_callers_salt_separates_prefixes(self, llama) -> None:
        prompt = tokens(6000, self.PROMPT)
        salted = [
            GenerateRequest(prompt=prompt, sampling=SamplingOptions(max_tokens=1), cache_salt=salt)
            for salt in ("a", "b", "a")
        ]
        cached = [(await run(llama, request)).usage.cached_tokens for request in salted]
        assert cached == [0, 0, 3 * BLOCK]


class TestBank:
    async def test_more_programs_than_slots_wait_and_all_are_steered(self, llama, model_folder) -> None:
        """Eight slots, twenty distinct programs at once."""
        oracle = Oracle(model_folder("llama"))
        requests = [ask(tokens(7000 + 50 * i, 12), add(100 + i), capture=ALL_LAYERS) for i in range(20)]
        generations = await asyncio.gather(*[run(llama, request) for request in requests])
        for request, generation in zip(requests, generations, strict=True):
            output = generation.outputs[0]
            assert output.receipt.steering_digest == request.steering.digest()
            want = oracle.streams([*generation.prompt_token_ids, *output.token_ids][:-1], request.steering)
            assert relative_error(output.captures[LAYERS - 1], want[LAYERS - 1]) <= 1e-5

    async def test_a_cancelled_request_gives_its_slot_back(self, llama) -> None:
        for seed in range(12):
            async with aclosing(llama.submit(ask(tokens(8000, 10), add(200 + seed), max_tokens=400))) as events:
                async for event in events:
                    if isinstance(event, TokenDelta):
                        break
        assert (await run(llama, ask(tokens(8000, 10), add(300)))).outputs[0].receipt.rows_steered > 0
        assert own_segments() == set()

    async def test_requests_cancelled_at_any_moment_do_not_affect_others(self, llama) -> None:
        """Before, at and after their first step: the worker may meet a request whose region is gone."""
        moments = np.random.default_rng(0).uniform(0.0, 0.08, size=120)

        async def cancelled(index: int) -> None:
            request = ask(tokens(100 + index, 40), add(400 + index % 9), max_tokens=400, capture=ALL_LAYERS)
            task = asyncio.ensure_future(run(llama, request))
            await asyncio.sleep(moments[index])
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        for first in range(0, len(moments), 10):
            await asyncio.gather(*[cancelled(index) for index in range(first, first + 10)])
        generation = await run(llama, ask(tokens(8100, 10), add(300), capture=ALL_LAYERS))
        assert generation.outputs[0].receipt.rows_captured == 10 + 8 - 1
        assert own_segments() == set()


class TestOutputs:
    async def test_each_of_n_outputs_has_its_own_captures(self, llama, model_folder) -> None:
        oracle = Oracle(model_folder("llama"))
        spec = add(5)
        generation = await run(llama, ask(tokens(9000, 10), spec, n=3, temperature=2.0, seed=7, capture=ALL_LAYERS))
        sequences = [tuple(output.token_ids) for output in generation.outputs]
        assert len(set(sequences)) == 3
        for output in generation.outputs:
            want = oracle.streams([*generation.prompt_token_ids, *output.token_ids][:-1], spec)
            for layer in range(LAYERS):
                assert relative_error(output.captures[layer], want[layer]) <= 1e-5
            assert output.receipt.rows_captured == 10 + 8 - 1
        assert generation.usage.completion_tokens == 24

    async def test_one_token_is_a_whole_generation(self, llama) -> None:
        generation = await run(llama, ask(tokens(9100, 10), add(6), max_tokens=1, capture=ALL_LAYERS))
        output = generation.outputs[0]
        assert len(output.token_ids) == 1
        assert output.finish_reason is FinishReason.LENGTH
        assert output.captures[0].shape == (10, WIDTH)

    async def test_a_stop_string_ends_the_output_and_its_captures(self, llama) -> None:
        free = await run(llama, ask(tokens(9200, 10), max_tokens=16))
        stop = free.outputs[0].text[6:9]
        stopped = await run(llama, ask(tokens(9200, 10), max_tokens=16, stop=(stop,), capture=ALL_LAYERS))
        output = stopped.outputs[0]
        assert output.finish_reason is FinishReason.STOP
        assert output.stop == stop
        assert output.text == free.outputs[0].text[: free.outputs[0].text.index(stop)]
        assert output.captures[0].shape[0] == 10 + len(output.token_ids) - 1 < 10 + 16 - 1

    async def test_a_long_request_ends_at_the_models_limit(self, llama) -> None:
        generation = await run(llama, ask(tokens(9300, 500), max_tokens=100))
        assert generation.sampling.max_tokens == 12
        assert len(generation.outputs[0].token_ids) == 12

    async def test_a_prompt_longer_than_a_step_is_captured_whole(self, llama, model_folder) -> None:
        """Chunked prefill: 300 tokens in steps of at most 64, three requests at once."""
        oracle = Oracle(model_folder("llama"))
        requests = [ask(tokens(9400 + i, 300), add(7 + i), capture=ALL_LAYERS) for i in range(3)]
        generations = await asyncio.gather(*[run(llama, request) for request in requests])
        for request, generation in zip(requests, generations, strict=True):
            output = generation.outputs[0]
            want = oracle.streams([*generation.prompt_token_ids, *output.token_ids][:-1], request.steering)
            for layer in range(LAYERS):
                assert relative_error(output.captures[layer], want[layer]) <= 1e-5

    async def test_chat_returns_message_boundaries(self, llama) -> None:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Name a colour."},
        ]
        responses, handles = await llama.chat(messages, max_tokens=4, temperature=0.0, capture_layers=[2])
        assert responses[0].prefill == ""
        async with handles[0] as handle:
            await handle.fetch()
            system, user = (handle.get_message_activations(i, 2) for i in range(2))
            boundaries = handle.message_boundaries
            assert [b.role for b in boundaries] == ["system", "user"]
            assert 0 < boundaries[0].start_token < boundaries[0].end_token < boundaries[1].start_token
            assert (len(system), len(user)) == (boundaries[0].num_tokens, boundaries[1].num_tokens)

    async def test_a_prefill_is_continued(self, llama) -> None:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
        responses, _ = await llama.chat(messages, max_tokens=4, temperature=0.0, continue_final_message=True)
        assert responses[0].prefill == "Well"
        assert responses[0].full_text() == "Well" + responses[0].generated


class TestSync:
    def test_sync_calls_work_twice_in_a_row(self, llama) -> None:
        first, _ = llama.generate_sync(["A prompt"], max_tokens=4, temperature=0.0)
        second, handles = llama.generate_sync(["A prompt"], max_tokens=4, temperature=0.0, capture_layers=[1])
        assert first == second
        assert handles[0].captures[1][0]["hidden"].shape[1] == WIDTH
        chats = [llama.chat_sync([{"role": "user", "content": "Hi"}], max_tokens=4)[0] for _ in range(2)]
        assert all(len(chat) == 1 for chat in chats)

    def test_calls_from_two_loops_in_a_row_work(self, llama) -> None:
        texts = [asyncio.run(llama.generate(["A prompt"], max_tokens=4, temperature=0.0))[0] for _ in range(2)]
        assert texts[0] == texts[1]


BAD_REQUESTS = {
    "an unknown layer": (
        lambda: ask(tokens(1, 5), add(1, layer=LAYERS)),
        InvalidRequest,
        r"steering\.layers\[4\].*Layer index 4 out of range \[0, 4\)",
    ),
    "an unknown capture layer": (
        lambda: ask(tokens(1, 5), capture=CaptureSpec(layers=(LAYERS,))),
        InvalidRequest,
        r"capture\.layers\[0\].*Capture layer index 4 is out of range",
    ),
    "a wrong width": (
        lambda: ask(tokens(1, 5), SteeringSpec.simple_add(1, np.ones(WIDTH + 1))),
        InvalidRequest,
        r"steering\.layers\[1\]\.operations\[0\]\.vector.*expected 128, got 129",
    ),
    "an overflow of the stream's dtype": (
        lambda: ask(tokens(1, 5), SteeringSpec(layers={0: LayerSteeringSpec([AddSpec(np.full(WIDTH, 1e30), 1e30)])})),
        InvalidRequest,
        r"operations\[0\]\.vector.*not finite",
    ),
    "a token outside the vocabulary": (
        lambda: ask(TokenPrompt(token_ids=(1, 10**6))),
        InvalidRequest,
        r"prompt\.token_ids.*token id 1000000 is outside",
    ),
    "a steered position before the prompt": (
        lambda: ask(tokens(1, 5), replace(add(1), positions=[0, -6])),
        InvalidRequest,
        r"steering\.positions\.ranges\[1\].*position -6 lies before the beginning of a prompt of 5 tokens",
    ),
    "a captured position beyond the request": (
        lambda: ask(tokens(1, 5), capture=CaptureSpec(layers=(0,), positions=12), max_tokens=8),
        InvalidRequest,
        r"capture\.positions\.ranges\[0\].*position 12 lies beyond the request, which has at most 12 rows",
    ),
    "captures in a third element type": (
        lambda: ask(tokens(1, 5), capture=CaptureSpec(layers=(0,), dtype="float16")),
        InvalidRequest,
        r"capture\.dtype.*not as float16",
    ),
    "a prompt over the limit": (
        lambda: ask(tokens(1, 512)),
        InvalidRequest,
        r"prompt.*has 512 tokens, more than the model's limit of 512",
    ),
    "an unknown model": (
        lambda: GenerateRequest(prompt=tokens(1, 5), model="other"),
        NotFound,
        r"model.*'other' is not served here",
    ),
    "too many operations at one layer": (
        lambda: ask(tokens(1, 5), SteeringSpec(layers={0: LayerSteeringSpec([AblationSpec(np.ones(WIDTH))] * 65)})),
        InvalidRequest,
        r"65 operations at one layer, at most 64",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("name", BAD_REQUESTS)
    async def test_a_bad_request_is_refused_before_any_event(self, llama, name) -> None:
        make, kind, message = BAD_REQUESTS[name]
        with pytest.raises(kind, match=message):
            await anext(llama.submit(make()))
        assert (await run(llama, ask(tokens(1, 5)))).outputs[0].text

    async def test_an_overflowing_residual_stream_fails_alone(self, llama) -> None:
        """Steering is finite, the stream after it is not: x + 3e38 twice."""
        huge = SteeringSpec(
            layers={1: LayerSteeringSpec([AddSpec(np.full(WIDTH, 3e38)), AddSpec(np.full(WIDTH, 3e38))])}
        )
        neighbour = ask(tokens(9500, 40), max_tokens=24)
        before = await run(llama, neighbour)
        poisoned, beside = await asyncio.gather(
            run(llama, ask(tokens(9600, 70), huge)), run(llama, neighbour), return_exceptions=True
        )
        assert isinstance(poisoned, InvalidRequest)
        assert poisoned.reason == "STEERING_NONFINITE"
        assert isinstance(beside, Generation)
        assert beside.outputs[0].token_ids == before.outputs[0].token_ids
        again = await asyncio.gather(run(llama, ask(tokens(9600, 70), huge)), return_exceptions=True)
        assert getattr(again[0], "reason", "") == "STEERING_NONFINITE"  # not served from poisoned blocks
        for start in range(0, 2000, 100):
            clean = await run(llama, ask(tokens(10_000 + start, 90), max_tokens=2))
            assert np.isfinite(logprobs(clean)).all()

    async def test_blocks_of_a_poisoned_request_that_was_cancelled_are_never_reused(self, llama) -> None:
        """Whoever comes later with the same steering and prefix computes it anew, and fails alike."""
        huge = SteeringSpec(
            layers={1: LayerSteeringSpec([AddSpec(np.full(WIDTH, 2e38)), AddSpec(np.full(WIDTH, 2e38))])}
        )
        prompt = tokens(9700, 400)  # seven steps before the first token
        for attempt in range(4):
            task = asyncio.ensure_future(run(llama, ask(prompt, huge)))
            await asyncio.sleep(0.01 * (attempt + 1))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        together = await asyncio.gather(*[run(llama, ask(prompt, huge)) for _ in range(3)], return_exceptions=True)
        assert [getattr(error, "reason", error) for error in together] == ["STEERING_NONFINITE"] * 3

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"no_such_argument": 1}, InvalidRequest, "no_such_argument: no such engine argument"),
            ({"tensor_paralel_size": 1}, InvalidRequest, "did you mean tensor_parallel_size"),
            (
                {"decode_context_parallel_size": 2},
                Unsupported,
                "decode_context_parallel_size: 2 is refused: .* not proven",
            ),
            ({"speculative_config": {"method": "ngram"}}, Unsupported, "speculative_config"),
            ({"worker_cls": "mine.Worker"}, Unsupported, "worker_cls: 'mine.Worker' is refused"),
            ({"override_generation_config": {"temperature": 0}}, Unsupported, "override_generation_config"),
        ],
    )
    def test_unsupported_arguments_are_refused_at_start(self, arguments, kind, message) -> None:
        with pytest.raises(kind, match=message):
            VLLMSteeringModel("anything", **arguments)

    @pytest.mark.extended
    def test_a_family_that_nobody_verified_is_refused_with_the_list(self, model_folder) -> None:
        """transformers' own Llama, whose layers return one tensor."""
        with pytest.raises(Unsupported, match=r"LlamaDecoderLayer has not been compared .*docs/models.md"):
            VLLMSteeringModel(str(model_folder("llama")), **ENGINE_ARGUMENTS, model_impl="transformers")
        assert own_segments() == set()


class TestClosing:
    @pytest.mark.extended
    async def test_close_leaves_no_process_and_no_file(self, model_folder) -> None:
        """The usual run closes the engine of test_data_parallel_with_async_scheduling_and_preemption in this way."""
        with leaves_nothing():
            model = VLLMSteeringModel(str(model_folder("llama")), **ENGINE_ARGUMENTS)
            await close_in_the_middle_of_a_captured_request(model)

    @pytest.mark.extended
    async def test_close_unmaps_the_workers_memory_before_the_garbage_collector_does(self, model_folder) -> None:
        before = mapped()
        model = VLLMSteeringModel(str(model_folder("llama")), **ENGINE_ARGUMENTS)
        await model.generate(["Once"], max_tokens=2, steering_spec=add(1))
        assert mapped() > before
        await model.close()
        assert mapped() == before


@pytest.mark.parametrize("is_live", [False, True], ids=["at the end", "live"])
async def test_a_reader_that_is_behind_gets_merged_deltas_and_every_row(llama, is_live) -> None:
    """While it does not read, another request, begun later and as long, is answered whole."""
    steps, captured = 40, CaptureSpec(layers=(0, 2), is_live=is_live)
    request = ask(tokens(700, 9), add(7), max_tokens=steps, capture=captured)
    whole = await run(llama, request)
    deltas, rows = list[TokenDelta](), dict[int, list[np.ndarray]]()
    async with aclosing(checked_events(llama, request)) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                deltas.append(event)
                if len(deltas) == 1:
                    await run(llama, ask(tokens(800, 9), max_tokens=steps))
            elif isinstance(event, CaptureBlock):
                rows.setdefault(event.layer, []).append(event.hidden.copy())
    assert len(deltas) <= 4
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.outputs[0].token_ids)
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    for layer, whole_TD in whole.outputs[0].captured.after.items():
        assert np.array_equal(np.concatenate(rows[layer]), whole_TD)
