"""The class for lm-eval on a served float32 model: the numbers of lm-eval's own model, and those of steering."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install '.[lm-eval]'")

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from steer_client import AblationSpec, AddSpec, InvalidRequest, LayerSteeringSpec, SteerError, SteeringSpec
from steer_client.lm_eval_model import SteerLM, scaled, steering_from
from steer_service.core.prompt import TokenPrompt
from steer_service.formats.checkpoint import save_spec
from steer_service.hf import HFSteeringModel
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.real_server.serving import free_port, running_server

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.extended]

ROOT = Path(__file__).parents[2]
TASKS = ["capitals", "capitals_generate", "capitals_text"]
NATS = 1e-4
"""Difference of log-probabilities in float32, for each token; 1e-5 was seen."""
LONG = "The sea is deep. " * 150
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "London"),  # the space belongs to the continuation
    ("", "Hello world"),
    ("The sea is", " blue and deep and cold"),
    (LONG, "The sea is"),  # cut on the left
    (CHAT, "Hello!"),  # begins with BOS
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server("--dtype", "float32") as server:
        yield server.address


@pytest.fixture(scope="module")
def hf() -> HFLM:
    return HFLM(pretrained=str(ensure_bundled_model()), dtype="float32", device="cpu", max_length=511)


def model_at(address: str, **options: Any) -> SteerLM:
    return SteerLM(address, tokenizer=str(ensure_bundled_model()), **options)


@pytest.fixture
def served(address: str) -> Iterator[SteerLM]:
    model = model_at(address)
    yield model
    model.close()


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one, task_name="test") for one in arguments]


def test_likelihoods_are_those_of_lm_evals_own_model(served: SteerLM, hf: HFLM) -> None:
    got, want = served.loglikelihood(asked(*PAIRS)), hf.loglikelihood(asked(*PAIRS))

    assert served.max_length == hf.max_length == 511
    assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in want]
    assert {is_greedy for _, is_greedy in got} == {True, False}
    np.testing.assert_allclose([total for total, _ in got], [total for total, _ in want], atol=5 * NATS, rtol=0)


def test_rolling_likelihoods_are_those_of_lm_evals_own_model(served: SteerLM, hf: HFLM) -> None:
    texts = asked(("The sea is blue.",), (LONG,))

    got, want = served.loglikelihood_rolling(texts), hf.loglikelihood_rolling(texts)

    np.testing.assert_allclose(got, want, atol=NATS * 750, rtol=0)  # LONG has 751 tokens in two windows


def test_generated_texts_are_those_of_lm_evals_own_model(served: SteerLM, hf: HFLM) -> None:
    requests = asked(
        ("The capital of France is", {"until": ["."], "max_gen_toks": 20}),
        ("One two three", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
        (LONG, {"until": [], "max_gen_toks": 12}),
    )

    assert served.generate_until(requests) == hf.generate_until(requests)


@pytest.mark.parametrize("apply_chat_template", [False, True])
def test_a_task_has_the_results_of_lm_evals_own_model(
    served: SteerLM, hf: HFLM, apply_chat_template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    got, want = (
        simple_evaluate(
            model=model,
            tasks=TASKS if not apply_chat_template else TASKS[:2],
            task_manager=TaskManager(include_path="examples/lm_eval", include_defaults=False),
            apply_chat_template=apply_chat_template,
            num_fewshot=0,
            bootstrap_iters=0,
        )["results"]
        for model in (served, hf)
    )

    assert got["capitals"]["acc,none"] == want["capitals"]["acc,none"] > 0.5
    assert got["capitals_generate"] == want["capitals_generate"]
    if not apply_chat_template:
        perplexity = "word_perplexity,none"
        assert got["capitals_text"][perplexity] == pytest.approx(want["capitals_text"][perplexity], rel=1e-4)


@pytest.mark.parametrize("positions", [None, ["generated", -1], 0])
def test_steered_likelihoods_are_those_of_the_steered_transformers_model(address: str, positions: Any) -> None:
    vector = np.random.default_rng(0).normal(size=576)
    spec = SteeringSpec.simple_add(12, vector, 0.75, positions=positions)
    served = model_at(address, steering=spec, scale=2.0)
    try:
        got = [total for total, _ in served.loglikelihood(asked(*PAIRS[:4]))]
        pairs = [
            served._encode_pair(*pair) if pair[0] else ([served.prefix_token_id], served.tok_encode(pair[1]))
            for pair in PAIRS[:4]
        ]
    finally:
        served.close()

    want, plain = asyncio.run(scores_of_transformers(pairs, scaled(spec, 2.0)))

    np.testing.assert_allclose(got, want, atol=5 * NATS, rtol=0)
    assert np.abs(np.subtract(want, plain)).min() > 10 * NATS


async def scores_of_transformers(pairs: list[Any], spec: SteeringSpec | None) -> tuple[list[float], list[float]]:
    with HFSteeringModel(ensure_bundled_model(), dtype=torch.float32) as model:
        prompts, answers = [TokenPrompt(token_ids=tuple(context)) for context, _ in pairs], [one for _, one in pairs]
        steered = await model.score(prompts, answers, steering_spec=spec)
        plain = await model.score(prompts, answers)
        return [score.total for score in steered], [score.total for score in plain]


def test_steering_changes_the_text_and_is_on_the_request_only(address: str, served: SteerLM) -> None:
    requests = asked(("The capital of France is", {"until": ["\n"], "max_gen_toks": 8}))
    steered = model_at(address, steering=SteeringSpec.simple_add(12, np.ones(576), 3.0))
    try:
        assert steered.generate_until(requests) != served.generate_until(requests)
    finally:
        steered.close()


def test_an_unknown_generation_argument_is_refused(served: SteerLM) -> None:
    with pytest.raises(InvalidRequest, match="num_beams is not an option here"):
        served.generate_until(asked(("a", {"until": ["."], "num_beams": 4})))


def test_another_tokenizer_and_a_length_beyond_the_server_are_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"max_length 512 is outside 1\.\.511"):
        model_at(address, max_length=512)
    with pytest.raises(InvalidRequest, match="transformers finds no tokenizer"):
        SteerLM(address, tokenizer=str(tmp_path))
    other = json.loads((ensure_bundled_model() / "tokenizer.json").read_text("utf-8"))
    other["model"]["merges"] = other["model"]["merges"][:100]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InvalidRequest, match="splits text in other ways than the server"):
        SteerLM(address, tokenizer=str(tmp_path))


def test_a_model_without_a_server_is_one_sentence() -> None:
    with pytest.raises(SteerError, match="no server answers at"):
        model_at(f"127.0.0.1:{free_port()}")


def test_steering_is_read_from_every_form(tmp_path: Path) -> None:
    spec = SteeringSpec({3: LayerSteeringSpec([AddSpec([1.0] * 8, scale=0.5)])})
    document = {"layers": {"3": [{"op": "add", "vector": [1.0] * 8, "scale": 0.5}]}}
    (tmp_path / "spec.json").write_text(json.dumps(document))
    save_spec(tmp_path / "folder", spec, model=FAKE_MODEL)

    for given in (spec, document, json.dumps(document), str(tmp_path / "spec.json"), str(tmp_path / "folder")):
        assert steering_from(given) == spec
    with pytest.raises(InvalidRequest, match="neither a JSON object nor a readable file or folder"):
        steering_from(str(tmp_path / "missing"))


def test_a_scale_is_for_additions() -> None:
    add, ablate = AddSpec([1.0, 2.0], scale=0.5), AblationSpec([1.0, 0.0])
    spec = SteeringSpec({1: LayerSteeringSpec([add])})

    assert scaled(spec, 4.0) == SteeringSpec({1: LayerSteeringSpec([AddSpec([1.0, 2.0], scale=2.0)])})
    with pytest.raises(InvalidRequest, match="only additions can be scaled"):
        scaled(SteeringSpec({1: LayerSteeringSpec([add, ablate])}), 2.0)
    with pytest.raises(InvalidRequest, match="a scale needs steering"):
        scaled(None, 2.0)
