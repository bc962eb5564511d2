"""The comparison of answers finds what is wrong with them, and passes those that are right."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.on_gpu.comparison import Answer, Findings, check, check_receipt, check_steered, compare_with_model
from bench.on_gpu.reference import Reference, TokenSequence
from bench.on_gpu.traffic import KINDS, requests_for
from steer_service.core.specs import SteeringSpec
from steer_service.hf import HFSteeringModel
from steer_service.runtime.results import collect

COUNT = len(KINDS)


async def ask(model: HFSteeringModel) -> list[Answer]:
    """One request of each kind, answered by transformers."""
    asked = requests_for(COUNT, model.info)
    generations = await asyncio.gather(*(collect(model.submit(one.request)) for one in asked))
    return [Answer(number=i, asked=asked[i], generation=generations[i]) for i in range(COUNT)]


@pytest.fixture(scope="module")
def answers(hf: HFSteeringModel) -> list[Answer]:
    """Answers in float32."""
    return asyncio.run(ask(hf))


@pytest.fixture(scope="module")
def reference(model_folder: Callable[[str], Path]) -> Reference:
    return Reference(model_folder("llama"), "cpu")


def of_kind(answers: list[Answer], kind: str) -> Answer:
    return answers[list(KINDS).index(kind)]


def changed(answer: Answer, change: Callable[[int, np.ndarray], np.ndarray]) -> Answer:
    """The answer with other rows after its layers."""
    output = answer.output
    after = {layer: change(layer, rows.copy()) for layer, rows in output.captured.after.items()}
    captured = replace(output.captured, after=after)
    return replace(answer, generation=replace(answer.generation, outputs=[replace(output, captured=captured)]))


def test_right_answers_of_each_kind_pass_and_are_told_from_unsteered_ones(answers: list[Answer]) -> None:
    findings = Findings()
    assert [check_receipt(answer) for answer in answers] == [""] * COUNT
    assert [check_steered(answer, "float32", findings) for answer in answers] == [""] * COUNT
    assert (findings.steered_requests, findings.told_apart) == (COUNT - 1, COUNT - 1)
    assert findings.steered_rows > 0
    assert 0.0 < findings.steered_worst <= 1.0


async def test_right_answers_of_a_16_bit_model_pass(model_folder: Callable[[str], Path]) -> None:
    findings = Findings()
    with HFSteeringModel(model_folder("llama"), dtype=torch.bfloat16) as model:
        answers = await ask(model)
    assert [check_receipt(answer) for answer in answers] == [""] * COUNT
    assert [check_steered(answer, "bfloat16", findings) for answer in answers] == [""] * COUNT
    assert (findings.steered_requests, findings.told_apart) == (COUNT - 1, COUNT - 1)


def test_the_same_requests_are_made_each_time(answers: list[Answer], hf: HFSteeringModel) -> None:
    again = requests_for(COUNT, hf.info)
    digests = [one.request.steering.digest() for one in again if one.request.steering is not None]
    assert digests == [one.asked.request.steering.digest() for one in answers if one.asked.request.steering is not None]
    assert len(set(digests)) == COUNT - 1
    assert [one.prompt for one in again] == [one.asked.prompt for one in answers]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
def test_rows_that_are_not_steered_as_asked_are_found(answers: list[Answer], kind: str) -> None:
    answer = of_kind(answers, kind)
    last = max(answer.operations)

    def unsteered(layer: int, rows_TD: np.ndarray) -> np.ndarray:
        return answer.output.captured.before[layer] if layer == last else rows_TD

    assert "outside the tolerance" in check_steered(changed(answer, unsteered), "float32", Findings())


def test_each_wrong_answer_is_a_failure_and_one_with_a_wrong_receipt_is_not_compared(answers: list[Answer]) -> None:
    right, add, cap = (of_kind(answers, kind) for kind in ("nothing", "an addition", "a cap"))
    receipt = replace(add.output.receipt, rows_total=1)
    incomplete = replace(add, generation=replace(add.generation, outputs=[replace(add.output, receipt=receipt)]))
    unsteered = changed(cap, lambda layer, rows_TD: cap.output.captured.before[layer])
    findings = Findings()

    assert check([right, incomplete, unsteered], "float32", findings) == [right, unsteered]

    first, second = findings.failures
    assert first.startswith("request 1 (an addition): the receipt has rows_total 1")
    assert second.startswith("request 2 (a cap): after layer")


def test_a_changed_bit_of_a_row_that_is_not_steered_is_found(answers: list[Answer]) -> None:
    def one_bit(layer: int, rows_TD: np.ndarray) -> np.ndarray:
        rows_TD.view(np.int32)[0, 0] ^= 1
        return rows_TD

    # The first token of a prompt is not among the generated ones.
    for kind in ("nothing", "an addition to generated tokens"):
        found = check_steered(changed(of_kind(answers, kind), one_bit), "float32", Findings())
        assert "rows that are not steered there have other bits" in found


def test_steering_too_small_to_be_seen_is_a_failure_of_the_comparison(answers: list[Answer]) -> None:
    answer = of_kind(answers, "an addition")
    (layer,) = answer.operations
    tiny = SteeringSpec.simple_add(layer, np.ones(answer.output.captured.after[layer].shape[1]), 1e-7)
    asked = replace(answer.asked, request=replace(answer.asked.request, steering=tiny))
    same = changed(replace(answer, asked=asked), lambda layer, rows_TD: answer.output.captured.before[layer])
    assert (
        check_steered(same, "float32", Findings()) == "without its steering the rows would be within the tolerance, too"
    )


@pytest.mark.parametrize("field", ["rows_steered", "rows_captured", "steering_digest", "captured_layers"])
def test_a_receipt_that_counts_wrongly_is_found(answers: list[Answer], field: str) -> None:
    answer = of_kind(answers, "a cap")
    receipt = replace(answer.output.receipt, **{field: type(getattr(answer.output.receipt, field))()})
    wrong = replace(answer, generation=replace(answer.generation, outputs=[replace(answer.output, receipt=receipt)]))
    assert check_receipt(wrong).startswith(f"the receipt has {field} ")


def test_captured_rows_are_where_the_model_in_float64_has_them(answers: list[Answer], reference: Reference) -> None:
    findings = Findings()
    compare_with_model(reference, answers, "float32", findings)
    assert findings.failures == []
    assert findings.model_rows == sum(len(rows) for one in answers for rows in one.output.captured.after.values())
    assert 0.0 < findings.model_median < 1e-5
    assert 0.0 < findings.model_worst <= 1.0


def test_a_row_of_another_token_is_outside_of_its_bound(answers: list[Answer], reference: Reference) -> None:
    def mixed_up(layer: int, rows_TD: np.ndarray) -> np.ndarray:
        return rows_TD if layer != 3 else np.roll(rows_TD, 1, axis=0)

    findings = Findings()
    wrong = changed(of_kind(answers, "nothing"), mixed_up)
    compare_with_model(reference, [of_kind(answers, "a cap"), wrong], "float32", findings)
    assert [line.split(":")[0] for line in findings.failures] == ["request 0 (nothing)"]
    assert findings.model_worst > 1.0


def test_padding_and_other_sequences_of_a_batch_change_nothing(reference: Reference) -> None:
    short = TokenSequence(token_ids=(5, 6, 7), prompt_tokens=3, steering=None, layers=(3,))
    long = TokenSequence(token_ids=tuple(range(100, 130)), prompt_tokens=30, steering=None, layers=(0, 3))
    together = reference.streams([long, short])
    alone = [*reference.streams([long]), *reference.streams([short])]
    for mine, other in zip(together, alone, strict=True):
        assert mine.keys() == other.keys()
        for layer, rows_TD in mine.items():
            assert rows_TD.dtype == np.float64
            np.testing.assert_allclose(rows_TD, other[layer], rtol=1e-6, atol=1e-6)  # norms are float32 inside


def test_the_reference_is_that_of_transformers(reference: Reference, hf: HFSteeringModel) -> None:
    tokens = tuple(range(50, 60))
    sequence = TokenSequence(token_ids=tokens, prompt_tokens=10, steering=None, layers=(0, 1, 2))
    (streams,) = reference.streams([sequence])
    states = hf(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    for layer, rows_TD in streams.items():
        np.testing.assert_allclose(rows_TD, states[layer + 1][0].detach().numpy(), rtol=1e-4, atol=1e-5)
