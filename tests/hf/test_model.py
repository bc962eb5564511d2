"""The calls of every backend on transformers: rows, tokens, text and what is refused."""

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_service.core.capture import CaptureDelivery, CaptureSite, CaptureSpec
from steer_service.core.errors import DeadlineExceeded, EngineFailed, InvalidRequest, NotFound, SteerError, Unsupported
from steer_service.core.events import CaptureBlock, FinishReason, TokenDelta
from steer_service.core.positions import PositionRange
from steer_service.core.prompt import ChatMessage, ChatPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.hf.layers import decoder_layers
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from tests.engine.oracle import Oracle, relative_error
from tests.tiny_models import LAYERS, WIDTH, ModelFolder
from tests.vanishing import vanishing

TOLERANCE = 1e-5
TOKENS = 6
GREEDY = SamplingOptions(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=3)
ALL_LAYERS = CaptureSpec(layers=range(LAYERS), site=CaptureSite.BOTH)


def direction(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=WIDTH)


ADD, CAP, ABLATE = (
    AddSpec(direction(1), 2.0),
    ProjectionCapSpec(direction(2), min=-0.1, max=0.3),
    AblationSpec(direction(3), -0.5),
)
SPECS = [
    None,
    SteeringSpec({1: LayerSteeringSpec([ADD])}),
    SteeringSpec({2: LayerSteeringSpec([ADD, CAP, ABLATE])}),
    SteeringSpec({2: LayerSteeringSpec([ABLATE, CAP, ADD])}, positions=[-1, "generated"]),
    SteeringSpec({layer: LayerSteeringSpec([CAP, ADD]) for layer in range(LAYERS)}, positions="prompt"),
]


def ask(tokens: Sequence[int] = range(500, 509), **fields: object) -> GenerateRequest:
    return GenerateRequest(**{"prompt": TokenPrompt(token_ids=tuple(tokens)), "sampling": GREEDY, **fields})


async def run(model: HFSteeringModel, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(model, request)), 120)


@pytest.fixture(scope="module")
def oracle(model_folder: ModelFolder) -> Oracle:
    return Oracle(model_folder("llama"))


async def test_rows_have_the_numbering_of_the_table_in_the_concepts(hf: HFSteeringModel):
    rows = (await run(hf, ask(sampling=SamplingOptions(max_tokens=0), capture=ALL_LAYERS))).outputs[0].captured.after
    with torch.no_grad():
        seen = hf.model(torch.arange(500, 509)[None], output_hidden_states=True).hidden_states
        normed = hf.model.model.norm(torch.from_numpy(rows[LAYERS - 1])).numpy()

    assert len(seen) == LAYERS + 1
    for layer in range(LAYERS - 1):
        assert relative_error(rows[layer], seen[layer + 1][0].numpy()) <= TOLERANCE
    assert relative_error(rows[LAYERS - 1], seen[LAYERS][0].numpy()) > 0.01, "the last entry is after the final norm"
    assert relative_error(normed, seen[LAYERS][0].numpy()) <= TOLERANCE


async def test_rows_of_prompts_of_different_length_in_one_batch_equal_the_oracle(hf: HFSteeringModel, oracle: Oracle):
    requests = [
        ask(range(700 + index, 705 + 8 * index), steering=spec, capture=ALL_LAYERS) for index, spec in enumerate(SPECS)
    ]
    generations = await asyncio.gather(*[run(hf, request) for request in requests])
    for request, generation in zip(requests, generations, strict=True):
        output, prompt_tokens = generation.outputs[0], len(generation.prompt_token_ids)
        tokens = [*generation.prompt_token_ids, *output.token_ids]
        for site, captured in (
            (CaptureSite.BEFORE, output.captured.before),
            (CaptureSite.AFTER, output.captured.after),
        ):
            want = oracle.streams(
                tokens[:-1], request.steering, prompt_tokens=prompt_tokens, before=site is CaptureSite.BEFORE
            )
            for layer in range(LAYERS):
                assert captured[layer].shape == (len(tokens) - 1, WIDTH)
                assert relative_error(captured[layer], want[layer]) <= TOLERANCE
        logprobs = oracle.logprobs(tokens, request.steering, prompt_tokens)
        np.testing.assert_allclose([entry.logprob for entry in output.logprobs], logprobs, atol=1e-4)
        assert all(entry.top[0][0] == entry.token_id for entry in output.logprobs)
    assert generations[0].outputs[0].receipt.rows_steered == 0
    assert generations[3].outputs[0].receipt.rows_steered == TOKENS
    assert generations[4].outputs[0].receipt.rows_steered == len(requests[4].prompt.token_ids)


async def test_neighbours_in_a_batch_change_nothing(hf: HFSteeringModel):
    alone = await run(hf, ask(capture=ALL_LAYERS))
    others = [ask(range(9, 40), steering=SPECS[2]), ask(range(3), steering=SPECS[4])]
    together, *_ = await asyncio.gather(*[run(hf, request) for request in [ask(capture=ALL_LAYERS), *others]])
    assert alone.outputs[0].token_ids == together.outputs[0].token_ids
    for layer in range(LAYERS):
        mine, theirs = alone.outputs[0].captures[layer], together.outputs[0].captures[layer]
        assert relative_error(mine, theirs) <= TOLERANCE


@pytest.mark.parametrize("delivery", [CaptureDelivery.HELD, CaptureDelivery.SHARED_MEMORY_PREFERRED])
async def test_held_and_live_rows_are_those_that_come_inline(hf: HFSteeringModel, delivery: CaptureDelivery):
    capture = CaptureSpec(layers=(3, 1), site=CaptureSite.BOTH, positions=[PositionRange(2, 5), "generated"])
    inline = (await run(hf, ask(capture=capture, steering=SPECS[2]))).outputs[0].captured
    live = (await run(hf, ask(capture=replace(capture, is_live=True), steering=SPECS[2]))).outputs[0].captured
    held = (await run(hf, ask(capture=replace(capture, delivery=delivery), steering=SPECS[2]))).outputs[0].held
    assert len(inline.after[1]) == 4 + TOKENS - 1
    assert live == inline
    rows = await held.rows()
    assert (rows.before.keys(), rows.after.keys()) == (inline.before.keys(), inline.after.keys())
    for layer in (1, 3):
        np.testing.assert_array_equal(rows.after[layer], inline.after[layer])
    await held.release()


async def test_live_rows_come_with_their_tokens(hf: HFSteeringModel):
    kinds = [
        type(event)
        async for event in hf.submit(ask(capture=CaptureSpec(layers=(1,), is_live=True)))
        if isinstance(event, (TokenDelta, CaptureBlock))
    ]
    assert kinds == [TokenDelta, CaptureBlock] * TOKENS


async def test_each_of_n_outputs_has_its_own_tokens_and_rows(hf: HFSteeringModel, oracle: Oracle):
    sampling = replace(GREEDY, n=3, temperature=1.5, seed=11)
    request = ask(sampling=sampling, capture=CaptureSpec(layers=(2,)), steering=SPECS[1])
    generation = await run(hf, request)
    again = await run(hf, request)
    assert [output.token_ids for output in generation.outputs] == [output.token_ids for output in again.outputs]
    assert len({tuple(output.token_ids) for output in generation.outputs}) == 3
    for output in generation.outputs:
        want = oracle.streams([*generation.prompt_token_ids, *output.token_ids][:-1], SPECS[1])
        assert relative_error(output.captures[2], want[2]) <= TOLERANCE


async def test_a_chat_has_boundaries_and_a_prefill(hf: HFSteeringModel):
    messages = (ChatMessage(role="user", content="Hello there"), ChatMessage(role="assistant", content="Well"))
    prompt = ChatPrompt(messages=messages, continue_final_message=True)
    generation = await run(hf, ask(prompt=prompt, capture=CaptureSpec(layers=(0,))))
    assert [boundary.role for boundary in generation.message_boundaries] == ["user", "assistant"]
    assert generation.message_boundaries[-1].end_token == len(generation.prompt_token_ids)
    [response], _ = await hf.chat([{"role": "user", "content": "Hello"}], max_tokens=3, temperature=0.0)
    assert response.generated


async def test_a_stop_token_ends_it_and_is_not_shown(hf: HFSteeringModel):
    free = (await run(hf, ask())).outputs[0]
    stop = free.token_ids[2]
    at = free.token_ids.index(stop)
    ended = (await run(hf, ask(sampling=replace(GREEDY, stop_token_ids=(stop,))))).outputs[0]
    assert ended.token_ids == free.token_ids[: at + 1]
    assert (ended.finish_reason, ended.stop) == (FinishReason.STOP, stop)
    assert ended.text == hf.tokenizer.decode(free.token_ids[:at])
    later = (await run(hf, ask(sampling=replace(GREEDY, stop_token_ids=(stop,), min_tokens=4)))).outputs[0]
    assert stop not in later.token_ids[:4]


async def test_a_stop_string_ends_it_wherever_it_lies(hf: HFSteeringModel):
    free = (await run(hf, ask())).outputs[0]
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    cut = free.text.index(stop)
    for include in (False, True):
        sampling = replace(GREEDY, stop=(stop, "never to be seen"), include_stop=include)
        deltas = [event async for event in hf.submit(ask(sampling=sampling)) if isinstance(event, TokenDelta)]
        assert "".join(delta.text for delta in deltas) == free.text[: cut + len(stop) * include]
    ended = (await run(hf, ask(sampling=replace(GREEDY, stop=(stop,))))).outputs[0]
    assert (ended.finish_reason, ended.stop) == (FinishReason.STOP, stop)


async def test_a_character_that_begins_in_the_prompt_is_not_generated_text(hf: HFSteeringModel):
    ids = hf.tokenizer.encode("My secret prompt words go here and 視𠜎")
    finished = replace(GREEDY, max_tokens=2, logit_bias={ids[-1]: 100.0}, stop=("secret",))

    [output] = (await run(hf, ask(ids[:-1], sampling=finished))).outputs

    assert output.token_ids == [ids[-1]] * 2
    assert (output.text, output.finish_reason) == ("\ufffd", FinishReason.LENGTH)  # the second finishes nothing


async def test_end_tokens_that_the_model_does_not_have_are_not_masked(hf: HFSteeringModel):
    tokenizer = copy.deepcopy(hf.tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<beyond>"})
    assert tokenizer.eos_token_id >= hf.info.vocab_size
    with HFSteeringModel(hf.model, tokenizer=tokenizer) as model:
        await run(model, ask(sampling=replace(GREEDY, min_tokens=2, ignore_eos=False)))


async def test_the_end_token_ends_it_unless_it_is_ignored(hf: HFSteeringModel):
    wanted = {hf.tokenizer.eos_token_id: 100.0}
    ended = (await run(hf, ask(sampling=replace(GREEDY, logit_bias=wanted, ignore_eos=None)))).outputs[0]
    assert (len(ended.token_ids), ended.finish_reason, ended.text) == (1, FinishReason.STOP, "")
    assert ended.receipt.rows_total == 9
    on = (await run(hf, ask(sampling=replace(GREEDY, logit_bias=wanted)))).outputs[0]
    assert (len(on.token_ids), on.finish_reason) == (TOKENS, FinishReason.LENGTH)


async def test_penalties_and_cuts_choose_as_their_formulas_say(hf: HFSteeringModel):
    free = (await run(hf, ask())).outputs[0]
    for options in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 2.0}):
        assert len((await run(hf, ask(sampling=replace(GREEDY, **options)))).outputs[0].token_ids) == TOKENS
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):  # only the likeliest is left
        sampled = await run(hf, ask(sampling=replace(GREEDY, temperature=2.0, seed=1, **cut)))
        assert sampled.outputs[0].token_ids == free.token_ids


BAD = {
    "steering.layers[9]": {"steering": SteeringSpec.simple_add(9, direction(1))},
    "steering.layers[1].operations[0].vector": {"steering": SteeringSpec.simple_add(1, direction(1)[:7])},
    "capture.layers[0]": {"capture": CaptureSpec(layers=(4,))},
    "prompt.token_ids": {"prompt": TokenPrompt(token_ids=(10**6,))},
    "steering.positions.ranges[0]": {"steering": SteeringSpec.simple_add(1, direction(1), positions=-30)},
}


@pytest.mark.parametrize("field", BAD)
async def test_bad_input_is_refused_by_field(hf: HFSteeringModel, field: str):
    with pytest.raises(SteerError) as refused:
        await run(hf, ask(**BAD[field]))
    assert refused.value.field == field


async def test_another_model_is_not_served(hf: HFSteeringModel):
    with pytest.raises(NotFound):
        await run(hf, ask(model="other"))


async def test_a_stream_that_overflows_fails_its_request_alone(hf: HFSteeringModel):
    huge = SteeringSpec({0: LayerSteeringSpec([AddSpec(np.full(WIDTH, 3e38)), AddSpec(np.full(WIDTH, 3e38))])})
    good, bad = await asyncio.gather(run(hf, ask()), run(hf, ask(steering=huge)), return_exceptions=True)
    assert isinstance(bad, InvalidRequest)
    assert bad.reason == "STEERING_NONFINITE"
    assert "after layer 0; lower the scale" in bad.message
    assert good.outputs[0].token_ids == (await run(hf, ask())).outputs[0].token_ids


async def test_a_row_that_becomes_zero_cannot_keep_its_norm_and_fails_its_request_alone(hf: HFSteeringModel):
    spec = vanishing(1, WIDTH)
    good, bad = await asyncio.gather(run(hf, ask()), run(hf, ask(steering=spec)), return_exceptions=True)
    assert isinstance(bad, InvalidRequest)
    assert (bad.reason, bad.field) == ("STEERING_NONFINITE", "steering")
    assert good.outputs[0].token_ids == (await run(hf, ask())).outputs[0].token_ids


async def test_a_report_has_the_changes_of_the_rows_that_operations_of_the_layer_acted_on(hf: HFSteeringModel):
    layers = {1: LayerSteeringSpec([replace(ADD, positions=-1), replace(CAP, positions="generated")])}
    spec = SteeringSpec(layers | {3: LayerSteeringSpec([ABLATE])}, report_change=True)
    generation = await run(hf, ask(steering=spec, capture=ALL_LAYERS))
    output, prompt_tokens = generation.outputs[0], len(generation.prompt_token_ids)
    first, second = output.receipt.changes
    for change, rows in ((first, slice(prompt_tokens - 1, None)), (second, slice(None))):
        before, after = (
            captured[change.layer][rows].astype(np.float64)
            for captured in (output.captured.before, output.captured.after)
        )
        relative = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
        assert change.positions == len(relative)
        np.testing.assert_allclose([change.largest, change.mean], [relative.max(), relative.mean()], rtol=1e-4)
    capped = (output.captured.before[1] != output.captured.after[1]).any(axis=1)[prompt_tokens:]
    assert (first.capped_positions, second.capped_positions) == (capped.sum(), 0)


async def test_a_caller_who_leaves_ends_its_output(hf: HFSteeringModel):
    events = hf.submit(ask(sampling=replace(GREEDY, max_tokens=900)))
    async for event in events:
        if isinstance(event, TokenDelta):
            break
    await events.aclose()
    assert (await asyncio.wait_for(run(hf, ask()), 20)).outputs[0].token_ids


async def test_closing_removes_the_hooks_and_ends_what_runs(model_folder: ModelFolder):
    model = HFSteeringModel(model_folder("llama"), target_layers=[1], init_scale=1.0)
    running = asyncio.ensure_future(run(model, ask(sampling=replace(GREEDY, max_tokens=900))))
    await asyncio.sleep(0.3)
    await model.close()
    await model.close()
    with pytest.raises(EngineFailed) as ended:
        await running
    assert ended.value.reason == "CLOSED"
    assert not any(layer._forward_hooks for layer in decoder_layers(model.model))
    with pytest.raises(EngineFailed):
        await run(model, ask())
    with pytest.raises(EngineFailed):
        model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("steering", [None, SPECS[2]])
async def test_scores_of_prompts_in_one_batch_are_those_of_the_oracle(
    hf: HFSteeringModel, oracle: Oracle, steering: SteeringSpec | None
):
    scored = replace(GREEDY, prompt_logprobs=2)
    requests = [ask(range(700, 700 + size), steering=steering, sampling=scored) for size in (300, 5, 1)]
    *answers, other = await asyncio.gather(*[run(hf, request) for request in [*requests, ask()]])
    for request, generation in zip(requests, answers, strict=True):
        tokens = request.prompt.token_ids
        scores = generation.prompt_logprobs
        assert (len(scores), scores[0]) == (len(tokens), None)
        want = oracle.logprobs([*tokens, 0], steering, prompt_tokens=1)[:-1]
        np.testing.assert_allclose([entry.logprob for entry in scores[1:]], want, atol=1e-4)
        assert all(len(entry.top) == 2 for entry in scores[1:])
    assert other.prompt_logprobs == []


async def test_only_allowed_tokens_are_generated_and_no_bad_word(hf: HFSteeringModel):
    allowed = hf.tokenizer.encode(" red green blue")
    options = replace(GREEDY, allowed_token_ids=allowed, max_tokens=12)
    free = (await run(hf, ask(sampling=options))).outputs[0]
    first = hf.tokenizer.decode(free.token_ids[:1])
    without = (await run(hf, ask(sampling=replace(options, bad_words=(first.strip(),))))).outputs[0]
    assert set(free.token_ids) <= set(allowed)
    assert set(without.token_ids) <= set(allowed) - {free.token_ids[0]}


async def test_options_that_leave_no_token_are_refused(hf: HFSteeringModel):
    token = hf.tokenizer.encode(" red")[0]
    for temperature in (0.0, 1.0):
        options = replace(GREEDY, allowed_token_ids=(token,), bad_words=("red",), temperature=temperature)
        with pytest.raises(InvalidRequest) as refused:
            await run(hf, ask(sampling=options))
        assert (refused.value.reason, refused.value.field) == ("NO_TOKEN_LEFT", "sampling.allowed_token_ids")


def test_the_facts_have_the_special_tokens_that_the_model_has(hf: HFSteeringModel) -> None:
    markers = hf.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])

    assert set(markers) <= set(hf.info.special_token_ids)
    assert list(hf.info.special_token_ids) == sorted(set(hf.info.special_token_ids))
    assert hf.tokenizer.decode(hf.info.special_token_ids, skip_special_tokens=True) == ""


def test_a_model_without_a_tokenizer_has_no_special_tokens(hf: HFSteeringModel) -> None:
    bare = copy.deepcopy(hf.model)
    bare.name_or_path = ""
    with HFSteeringModel(bare) as model:
        assert model.info.special_token_ids == ()
        assert not model.info.has_chat_template


async def test_a_timeout_ends_a_call_and_the_model_serves_the_next(hf: HFSteeringModel) -> None:
    prompt = TokenPrompt(token_ids=range(500, 520))
    with pytest.raises(DeadlineExceeded):
        await hf.generate([prompt] * 2, max_tokens=2000, ignore_eos=True, capture_layers=[1], timeout_s=0.01)
    with pytest.raises(DeadlineExceeded):
        async for _ in hf.stream_events(prompt, max_tokens=2000, ignore_eos=True, timeout_s=0.01):
            pass
    [generation], _ = await hf.generate(prompt, max_tokens=2, ignore_eos=True, timeout_s=300, raw_output=True)
    assert len(generation.outputs[0].token_ids) == 2


async def test_structured_outputs_are_refused_by_name(hf: HFSteeringModel) -> None:
    with pytest.raises(Unsupported) as refused:
        await hf.generate("a", structured_outputs={"choice": ["yes", "no"]})
    assert (refused.value.field, refused.value.reason) == ("sampling.structured_outputs", "NO_STRUCTURED_OUTPUTS")


async def test_a_model_in_float64_steers_and_says_in_which_dtype_it_can_be_captured(hf: HFSteeringModel) -> None:
    prompt, vector = TokenPrompt(token_ids=range(500, 505)), np.ones(hf.info.hidden_size, np.float32)
    cap = ProjectionCapSpec(vector, min=-1.0, max=1.0)
    spec = SteeringSpec(layers={1: LayerSteeringSpec([AddSpec(vector), cap, AblationSpec(vector)])})
    with HFSteeringModel(copy.deepcopy(hf.model).double(), tokenizer=hf.tokenizer) as model:
        options = {"max_tokens": 2, "steering_spec": spec, "capture_layers": [1]}
        _, [handle] = await model.generate(prompt, capture_dtype="float32", **options)
        rows = np.concatenate([entry["hidden"] for entry in (await handle.fetch())[1]])
        assert abs(rows @ vector).max() < 1e-3 * np.linalg.norm(rows) * np.linalg.norm(vector)
        with pytest.raises(InvalidRequest, match="float64"):
            await model.generate(prompt, **options)
