"""What `steer train` advises: texts whose end hides a difference, scales below 1, and the other layers."""

# ruff: noqa: F811  (fixtures of another test)

import re
import shlex
from pathlib import Path

import pytest

from steer_client import TextPrompt
from steer_service.cli.main import main
from steer_service.cli.train_advice import same_end
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt
from steer_service.directions.contrast import ContrastPair
from steer_service.hf.model import HFSteeringModel
from tests.cli.test_train import contrast, hf  # noqa: F401  (fixtures)


def pair(positive: str, negative: str) -> ContrastPair:
    return ContrastPair(TextPrompt(text=positive), TextPrompt(text=negative))


STOPPED, OPEN = pair("I feel great.", "I feel grim."), pair("I feel great", "I feel grim")


@pytest.mark.parametrize(
    ("pairs", "count"),
    [
        ([STOPPED, STOPPED, OPEN], 2),
        ([pair("Great!", "Grim!"), pair("(A)", "(B)")], 2),
        ([pair("好。", "坏。")], 1),
        ([STOPPED, OPEN], None),
        ([pair("Great!", "Grim.")], None),
        ([pair("Great ", "Grim ")], None),
    ],
)
def test_pairs_that_end_with_the_same_mark_are_pointed_out(pairs: list[ContrastPair], count: int | None) -> None:
    said = same_end(pairs)
    if count is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(f"hint: in {count} of {len(pairs)} pairs, both texts end with the same ")
        assert "--rows=-2" in said


def test_the_end_of_a_chat_is_not_that_of_its_text() -> None:
    chat: list[Prompt] = [
        ChatPrompt(messages=(ChatMessage(role="user", content=text),)) for text in ("Great.", "Grim.")
    ]
    assert same_end([ContrastPair(*chat)]) is None


def test_the_next_steps_are_commands_that_work(
    hf: HFSteeringModel, contrast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my steering"
    arguments = ["train", str(contrast), "--model", hf.model_name, "--scales=1", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().err
    assert "both texts end with the same '.'" in printed
    assert f"steer: begin below scale 1: `steer generate PROMPT --steering '{out}' --scale 0.5`\n" in printed
    [sweep] = re.findall(r"`steer (vectors sweep .*)` measures one", printed)
    assert main([*shlex.split(sweep), "--scales=0.5"]) == 0
    swept = capsys.readouterr()
    [other] = re.findall(r"--layer (\d+)", sweep)
    assert f"steering layer {other} (addition" in swept.err
    assert swept.out.split()[3] == "0.5"


def test_one_layer_and_another_row_need_no_advice_about_them(
    hf: HFSteeringModel, contrast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(contrast), "--model", hf.model_name, "--scales=1", "--layers=1", "--rows=-2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().err
    assert "begin below scale 1" in printed
    assert "hint:" not in printed
    assert "other layers:" not in printed
