"""What the programs in examples/python claim holds on the bundled model."""

from pathlib import Path

import numpy as np
import pytest

from tests.examples.node import EXAMPLES
from tests.examples.python import numbers_in, run_program
from tests.real_server.serving import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def lines_of(capsys: pytest.CaptureFixture[str], name: str, server: Server, *arguments: str) -> list[str]:
    run_program(name, "--address", server.address, *arguments)
    return capsys.readouterr().out.splitlines()


def test_stream_prints_one_sentence(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    [line] = lines_of(capsys, "stream", server)

    assert line.startswith("[SmolLM2-135M-Instruct] The capital of France is Paris")
    assert line.endswith(".")


def test_steering_moves_the_odds_of_happy_and_sad_with_its_scale(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, *steered, receipts = lines_of(capsys, "steer", server)

    table = [numbers_in(line)[:2] for line in steered]
    assert [scale for scale, _ in table] == [-2, -1, 0, 1, 2]
    odds = [nats for _, nats in table]
    assert odds == sorted(odds)
    assert odds[-1] - odds[0] > 5  # nats; 9 were seen
    assert receipts.startswith("Every receipt names the steering that was sent")


def test_captured_prompts_are_nearest_to_prompts_about_the_same_subject(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, *pairs = lines_of(capsys, "capture", server, "--out", str(tmp_path / "rows.npz"))

    prompts = (EXAMPLES / "python" / "data" / "prompts.txt").read_text("utf-8").splitlines()
    subject_of = {prompt[:50].strip(): index // 5 for index, prompt in enumerate(prompts)}  # five of each subject
    found = [[subject_of[text.strip()] for text in pair.split("  is like  ")] for pair in pairs]
    assert len(found) == len(prompts) == 15
    assert sum(mine == other for mine, other in found) >= 14  # 15 were seen; chance would be 4
    arrays = np.load(tmp_path / "rows.npz")
    assert arrays["hidden"].shape == (len(arrays["token"]), 576)
    assert arrays["position"].tolist() == [
        position for prompt in range(15) for position in range((arrays["prompt"] == prompt).sum())
    ]


def test_a_probe_knows_the_kind_of_adjectives_it_never_saw(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")

    first, _, *layers = lines_of(capsys, "probe", server)

    accuracy = {int(line.split()[0]): numbers_in(line)[0] for line in layers}
    assert first == "192 sentences to train with, 128 with unseen adjectives"
    assert list(accuracy) == list(range(0, 30, 3))
    assert accuracy[0] < 0.75  # 0.59 was seen, and 0.5 is chance
    assert min(accuracy[layer] for layer in (12, 15, 18)) > 0.95  # 1.0 was seen


def test_an_injected_row_answers_for_a_word_that_the_prompt_does_not_have(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, *table, _, _, _, apple_river, river_apple = lines_of(capsys, "oracle", server)

    none, *countries = [numbers_in(line) for line in table]
    for index, of_country in enumerate(countries):
        others = [logprob for other, logprob in enumerate(of_country) if other != index]
        assert of_country[index] > max(others) + 3  # nats; 5 were seen
        assert of_country[index] > none[index] + 8  # 12 were seen
    # The prompt asks for the second of two words, whose rows stand at two positions of one layer.
    apple, river = numbers_in(apple_river)
    assert river > apple + 0.5
    apple, river = numbers_in(river_apple)
    assert apple > river + 0.5
