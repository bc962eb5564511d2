"""The likelihood of given answers: one request for each, and steering as if the model had generated the answer."""

from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.events import Event
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.spans import OPEN_END
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.scoring import AnswerScorer, with_answer
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.tiny_models import WIDTH

PROMPT, ANSWERS = "The harbour was", [" quiet before sunrise", " full", " a long way off"]


def steered(positions: object = None) -> SteeringSpec:
    return SteeringSpec.simple_add(2, np.random.default_rng(0).normal(size=WIDTH), 2.0, positions=positions)


def steered_apart() -> SteeringSpec:
    """Steering whose operations have positions of their own."""
    vectors = np.random.default_rng(1).normal(size=(3, WIDTH))
    scopes = ("prompt", "generated[1:3]", None)
    operations = [AddSpec(vector, 2.0, positions=scope) for vector, scope in zip(vectors, scopes, strict=True)]
    return SteeringSpec({1: LayerSteeringSpec(operations)}, positions=-1)


@pytest.mark.parametrize(
    "steering",
    [
        *map(steered, [None, "prompt", "generated", -1, [0, "generated"], range(1, 3)]),
        pytest.param(steered_apart(), id="each operation"),
    ],
)
async def test_the_score_is_that_of_the_answer_when_the_model_generates_it(
    hf: HFSteeringModel, steering: SteeringSpec
) -> None:
    options = {"max_tokens": 5, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}
    [generation], _ = await hf.generate(PROMPT, steering_spec=steering, raw_output=True, **options)
    output = generation.outputs[0]

    [score] = await hf.score(PROMPT, [output.token_ids], steering_spec=steering)

    assert score.token_ids == tuple(output.token_ids)
    np.testing.assert_allclose(score.logprobs, [entry.logprob for entry in output.logprobs], atol=1e-4)
    assert score.total == pytest.approx(sum(score.logprobs))
    assert score.mean == pytest.approx(np.mean(score.logprobs))


async def test_answers_follow_one_prompt_or_one_each_and_may_be_text_or_tokens(hf: HFSteeringModel) -> None:
    scores = await hf.score(PROMPT, ANSWERS)
    again = await hf.score([PROMPT] * 3, [*ANSWERS[:2], scores[2].token_ids])
    chat = ChatPrompt(messages=(ChatMessage(role="user", content="Where is it?"),))
    [in_chat] = await hf.score(chat, ["In the harbour"])

    assert [len(score.token_ids) for score in scores] == [len(score.logprobs) for score in scores]
    for mine, other in zip(scores, again, strict=True):
        assert mine.token_ids == other.token_ids
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)
    assert hf.tokenizer.decode(in_chat.token_ids).startswith("In the harbour")


class Counting(FakeBackend):
    """Counts the requests for scores, and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.scored = 0
        self.others = 0

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        is_scored = request.sampling.prompt_logprobs is not None
        self.scored += is_scored
        self.others += not is_scored
        async for event in super().submit(request):
            yield event


async def test_forty_answers_under_five_scales_are_one_request_each_and_one_for_the_prompt() -> None:
    model = Counting()
    scorer = AnswerScorer(model.complete, [TextPrompt(text="a b")] * 40, [f" c{index} d" for index in range(40)])

    for scale in range(5):
        scores = await scorer.score(SteeringSpec.simple_add(1, np.ones(8), scale + 1.0))

    assert (model.scored, model.others) == (200, 1)
    assert [len(score.logprobs) for score in scores] == [2] * 40


async def test_positions_of_the_prompt_end_where_the_answer_begins() -> None:
    model = FakeBackend()
    for positions, spans in (("prompt", ((0, 3),)), ("generated", ((3, OPEN_END),)), (-1, ((2, 3),))):
        await model.score(
            [(1, 2, 3)], [(4, 5)], steering_spec=SteeringSpec.simple_add(1, np.ones(8), positions=positions)
        )
        steering = model.requests[-1].steering
        assert steering is not None
        assert steering.positions is not None
        assert steering.positions.resolve(5, OPEN_END) == spans


async def test_answers_that_cannot_be_scored_are_refused_by_name(hf: HFSteeringModel) -> None:
    cases: list[tuple[object, object, str]] = [
        ("The elephan", ["t sat"], "answers[0]"),
        ("The", [" a", ""], "answers[1]"),
        ([(1, 2)], ["text"], "answers[0].prompt"),
        (["a", "b"], [" c"], "answers"),
        ("a", " b", "answers"),
    ]
    for prompts, answers, field in cases:
        with pytest.raises(InvalidRequest) as refused:
            await hf.score(prompts, answers)
        assert refused.value.field == field


def test_a_turn_that_was_begun_is_continued() -> None:
    begun = ChatPrompt(
        messages=(ChatMessage(role="user", content="Q"), ChatMessage(role="assistant", content="It")),
        continue_final_message=True,
    )

    whole = with_answer(begun, " is")

    assert isinstance(whole, ChatPrompt)
    assert [turn.content for turn in whole.messages] == ["Q", "It is"]


async def test_every_request_of_a_score_has_the_model_the_salt_and_the_priority_of_the_call() -> None:
    backend = FakeBackend(replace(FAKE_MODEL, adapters=("sea",)))

    await backend.score("p q", [" r"], model="sea", cache_salt="mine", timeout_s=60)

    assert [(request.model, request.cache_salt) for request in backend.requests] == [("sea", "mine")] * 2


@pytest.mark.parametrize(
    ("options", "field"),
    [({"timeout_s": 0}, "timeout_s"), ({"temperature": 1.0}, "temperature"), ({"model": 5}, "model")],
)
async def test_options_that_a_score_does_not_have_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await FakeBackend().score("p q", [" r"], **options)

    assert raised.value.field == field
