"""Steering and captures narrowed to chosen rows, at chosen sites, on real vLLM, beside the prefix cache."""

import asyncio

import numpy as np
import pytest

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import PositionRange
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import OPEN_END, clipped, positions_of
from steer_service.core.specs import AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import Generation, collect
from tests.engine.conftest import BLOCK
from tests.engine.oracle import Oracle, relative_error
from tests.tiny_models import LAYERS, WIDTH, ModelFolder

pytestmark = pytest.mark.engine

PROMPT = 3 * BLOCK + 5
"""Tokens: three whole blocks and a part of a fourth."""

MAX_TOKENS = 8

SCOPES = {
    "last prompt token": -1,
    "prompt": "prompt",
    "generated": "generated",
    "ranges": [range(3, 7), PositionRange(-4, -2), PROMPT + 1, PositionRange(PROMPT + 3, None)],
    "from the last prompt token on": PositionRange(-1, None),
    "across a block's end": range(BLOCK - 2, BLOCK + 2),
    "a part of the answer": "generated[2:5]",
    "the answer's beginning and its cause": [-1, "generated[:3]", "generated[20:]"],
}


@pytest.fixture(scope="module")
def oracle(model_folder: ModelFolder) -> Oracle:
    return Oracle(model_folder("llama"))


def spec(positions: object = None, seed: int = 1) -> SteeringSpec:
    rng = np.random.default_rng(seed)
    add, cap = AddSpec(rng.normal(size=WIDTH), 3.0), ProjectionCapSpec(rng.normal(size=WIDTH), max=0.1)
    return SteeringSpec({0: LayerSteeringSpec([add]), 2: LayerSteeringSpec([cap, add])}, positions=positions)


def ask(start: int, steering: SteeringSpec | None = None, capture: CaptureSpec | None = None) -> GenerateRequest:
    return GenerateRequest(
        prompt=TokenPrompt(token_ids=range(start, start + PROMPT)),
        steering=steering,
        capture=capture,
        sampling=SamplingOptions(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0),
    )


async def run(model: VLLMSteeringModel, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(model.submit(request)), timeout=120)


def fed(generation: Generation) -> list[int]:
    return [*generation.prompt_token_ids, *generation.outputs[0].token_ids][:-1]


def logprobs(generation: Generation) -> list[float]:
    return [entry.logprob for entry in generation.outputs[0].logprobs]


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
async def test_steering_narrowed_to_positions_is_exact(llama: VLLMSteeringModel, oracle: Oracle, scope: object) -> None:
    narrowed = spec(scope)
    generation = await run(llama, ask(2000, narrowed, CaptureSpec(layers=range(LAYERS))))
    output = generation.outputs[0]
    want = oracle.streams(fed(generation), narrowed, prompt_tokens=PROMPT)
    for layer in range(LAYERS):
        assert relative_error(output.captured.after[layer], want[layer]) <= 1e-5
    rows = positions_of(clipped(narrowed.positions.resolve(PROMPT, OPEN_END), PROMPT + MAX_TOKENS - 1))
    assert output.receipt.rows_steered == len(rows) > 0
    assert np.flatnonzero(output.captured.labels.is_steered).tolist() == rows.tolist()


def by_operation(*scopes: object) -> SteeringSpec:
    """At each of two layers an addition and a cap for each of these positions."""
    rng = np.random.default_rng(7)
    operations = [
        operation
        for scope in scopes
        for operation in (
            AddSpec(rng.normal(size=WIDTH), 3.0, positions=scope),
            ProjectionCapSpec(rng.normal(size=WIDTH), max=0.1, positions=scope),
        )
    ]
    return SteeringSpec({0: LayerSteeringSpec(operations[:2]), 2: LayerSteeringSpec(operations[2:])})


async def test_operations_with_positions_of_their_own_are_exact_and_share_prefixes_by_them(
    llama: VLLMSteeringModel, oracle: Oracle
) -> None:
    """Two vectors at two positions of one layer, a third in the answer; later ones have other positions."""
    reused = []
    for scopes in ((3, 7, "generated[1:4]"), (3, 7, "generated[1:4]"), (3, 8, "generated[1:4]"), (7, 3, "generated")):
        steering = by_operation(*scopes)
        plain = await run(llama, ask(2900, steering))
        want = oracle.logprobs([*fed(plain), plain.outputs[0].token_ids[-1]], steering, PROMPT)
        np.testing.assert_allclose(logprobs(plain), want, atol=1e-4)
        reused.append(plain.usage.cached_tokens // BLOCK)
        generation = await run(llama, ask(2900, steering, CaptureSpec(layers=range(LAYERS))))
        output = generation.outputs[0]
        streams = oracle.streams(fed(generation), steering, prompt_tokens=PROMPT)
        for layer in range(LAYERS):
            assert relative_error(output.captured.after[layer], streams[layer]) <= 1e-5
        steered = np.flatnonzero(output.captured.labels.is_steered).tolist()
        answer = range(PROMPT + 1, PROMPT + 4) if "[" in scopes[2] else range(PROMPT, PROMPT + MAX_TOKENS - 1)
        assert steered == [*sorted(scopes[:2]), *answer]
        assert output.receipt.rows_steered == len(steered)
        assert output.receipt.steering_digest == steering.digest()
    assert reused == [0, 3, 0, 0]


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
async def test_captures_of_chosen_positions_are_those_rows(
    llama: VLLMSteeringModel, oracle: Oracle, scope: object
) -> None:
    capture = CaptureSpec(layers=(1, 2), positions=scope, site=CaptureSite.BOTH)
    generation = await run(llama, ask(2200, spec(), capture))
    captured = generation.outputs[0].captured
    rows = positions_of(captured.spans)
    assert (
        rows.tolist()
        == positions_of(clipped(capture.positions.resolve(PROMPT, OPEN_END), len(fed(generation)))).tolist()
    )
    before, after = (oracle.streams(fed(generation), spec(), before=before) for before in (True, False))
    for layer in (1, 2):
        assert relative_error(captured.before[layer], before[layer][rows]) <= 1e-5
        assert relative_error(captured.after[layer], after[layer][rows]) <= 1e-5
    assert captured.labels.positions.tolist() == rows.tolist()
    assert captured.labels.token_ids.tolist() == np.array(fed(generation))[rows].tolist()
    assert captured.labels.is_generated.tolist() == (rows >= PROMPT).tolist()


async def test_a_capture_recomputes_no_row_before_its_first(llama: VLLMSteeringModel, oracle: Oracle) -> None:
    """The prefix before the first captured row comes from the cache, the rest does not."""
    await run(llama, ask(2400))
    for first, reused in ((PROMPT - 1, 3), (2 * BLOCK, 2), (2 * BLOCK - 1, 1), (BLOCK - 1, 0), (0, 0)):
        capture = CaptureSpec(layers=(0, LAYERS - 1), positions=PositionRange(first, None))
        generation = await run(llama, ask(2400, capture=capture))
        assert generation.usage.cached_tokens == reused * BLOCK
        want = oracle.streams(fed(generation), None)
        for layer in capture.layers:
            assert relative_error(generation.outputs[0].captured.after[layer], want[layer][first:]) <= 1e-5


async def test_a_capture_of_generated_rows_keeps_the_whole_prefix(llama: VLLMSteeringModel) -> None:
    await run(llama, ask(2600))
    generation = await run(llama, ask(2600, capture=CaptureSpec(layers=(1,), positions="generated")))
    assert generation.usage.cached_tokens == 3 * BLOCK
    assert generation.outputs[0].receipt.rows_captured == MAX_TOKENS - 1


async def test_equal_scopes_share_a_prefix_and_others_do_not(llama: VLLMSteeringModel, oracle: Oracle) -> None:
    """A scope that a prefix hit would skip: what is reused was steered alike, or nothing is reused."""
    scopes = (5, 5, range(5, 7), None, "prompt", 6)
    reused = []
    for scope in scopes:
        generation = await run(llama, ask(2800, spec(scope)))
        reused.append(generation.usage.cached_tokens // BLOCK)
        want = oracle.logprobs([*fed(generation), generation.outputs[0].token_ids[-1]], spec(scope), PROMPT)
        np.testing.assert_allclose(logprobs(generation), want, atol=1e-4)
    assert reused == [0, 3, 0, 0, 0, 0]


async def test_the_last_token_of_a_longer_prompt_is_another_one(llama: VLLMSteeringModel, oracle: Oracle) -> None:
    """The same scope, -1, after a shared prefix: the shorter prompt's last token must not stay steered."""
    short = TokenPrompt(token_ids=range(3000, 3000 + 2 * BLOCK))
    long = TokenPrompt(token_ids=range(3000, 3000 + 3 * BLOCK))
    sampling = SamplingOptions(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
    for prompt in (short, long):
        generation = await run(llama, GenerateRequest(prompt=prompt, steering=spec(-1), sampling=sampling))
        sequence = [*fed(generation), generation.outputs[0].token_ids[-1]]
        want = oracle.logprobs(sequence, spec(-1), len(prompt.token_ids))
        np.testing.assert_allclose(logprobs(generation), want, atol=1e-4)
        assert generation.usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("scope", "field"),
    [
        (PROMPT + MAX_TOKENS - 1, "ranges[0]"),
        (-PROMPT - 1, "ranges[0]"),
        ([0, PositionRange(PROMPT - 1, -3)], "ranges[1]"),
        (PositionRange(0, 5000), "ranges[0]"),
    ],
)
async def test_positions_outside_the_request_are_refused_by_field(
    llama: VLLMSteeringModel, scope: object, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await run(llama, ask(0, steering=spec(scope)))
    assert refused.value.field == f"steering.positions.{field}"
    with pytest.raises(InvalidRequest) as refused:
        await run(llama, ask(0, capture=CaptureSpec(layers=(0,), positions=scope)))
    assert refused.value.field == f"capture.positions.{field}"


async def test_a_union_with_one_empty_part_is_served(llama: VLLMSteeringModel) -> None:
    sampling = SamplingOptions(max_tokens=1)
    capture = CaptureSpec(layers=(1,), positions=["generated", -1])
    prompt = TokenPrompt(token_ids=(1, 2, 3))
    request = GenerateRequest(prompt=prompt, steering=spec(["generated", -1]), capture=capture, sampling=sampling)
    receipt = (await run(llama, request)).outputs[0].receipt
    assert (receipt.rows_steered, receipt.rows_captured) == (1, 1)


async def test_generated_rows_of_a_request_for_one_token_are_refused(llama: VLLMSteeringModel) -> None:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=(1, 2, 3)), steering=spec("generated"), sampling=SamplingOptions(max_tokens=1)
    )
    with pytest.raises(InvalidRequest, match="at most 0 rows of generated tokens"):
        await run(llama, request)
