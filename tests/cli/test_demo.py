"""`steer demo`, for real: the bundled model on vLLM behind a server in a child process."""

import json
import subprocess
import sys
from typing import Any

import pytest

from steer_service.cli import demo

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ANSWERS = ("unsteered", "steered", "capped", "ablated")
LIMIT_S = 500.0
"""Seconds for loading the model and one short batch, on a busy machine that also converts the model."""


@pytest.fixture(scope="module")
def finished() -> subprocess.CompletedProcess[str]:
    pytest.importorskip("vllm")
    return subprocess.run(
        [sys.executable, "-m", "steer_service.cli", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def shown(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_json_has_the_four_answers_and_the_capture(shown: dict[str, Any]) -> None:
    assert list(shown) == [*ANSWERS, "captured"]
    assert all(set(shown[name]) == {"text", "receipt"} for name in ANSWERS)


def test_every_way_to_steer_changes_the_text(shown: dict[str, Any]) -> None:
    texts = [shown[name]["text"] for name in ANSWERS]
    assert len(set(texts)) == len(texts)


def test_the_steered_text_is_about_the_sea_and_the_unsteered_is_not(shown: dict[str, Any]) -> None:
    words = ("sea", "ocean", "water", "wave", "beach", "fish")
    assert any(word in shown["steered"]["text"] for word in words)
    assert not any(word in shown["unsteered"]["text"] for word in words)


def test_every_answer_comes_with_the_receipt_of_its_own_steering(shown: dict[str, Any]) -> None:
    receipts = {name: shown[name]["receipt"] for name in ANSWERS}
    digests = [receipts[name]["steering_digest"] for name in ANSWERS]
    assert digests[0] == ""
    assert len(set(digests)) == len(digests)
    assert receipts["unsteered"]["rows_steered"] == 0
    for name in ANSWERS[1:]:
        assert receipts[name]["steered_layers"] == [demo.STEERED_LAYER]
        assert receipts[name]["rows_steered"] + receipts[name]["rows_from_prefix_cache"] == receipts[name]["rows_total"]


def test_the_captures_have_the_shape_of_the_model(shown: dict[str, Any]) -> None:
    captured = shown["captured"]
    assert captured["layers"] == list(demo.CAPTURED_LAYERS)
    assert captured["width"] == 576
    assert captured["rows"] > len(demo.SEA + demo.LAND)


def test_progress_is_on_standard_error_only(finished: subprocess.CompletedProcess[str]) -> None:
    assert len(finished.stdout.splitlines()) == 1
    for step in ("loading the model", "capturing layers", "in one batch", "tokens"):
        assert step in finished.stderr
