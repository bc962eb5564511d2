"""The check of prose in `make check` finds what it should, and reads nothing but prose."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "check_prose.py"
_spec = importlib.util.spec_from_file_location("check_prose", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
check_prose = importlib.util.module_from_spec(_spec)
sys.modules["check_prose"] = check_prose  # dataclasses look their module up
_spec.loader.exec_module(check_prose)

LONG = " ".join(["word"] * 31)


def problems(markdown: str) -> list[str]:
    paragraphs = check_prose.markdown_paragraphs("page.md", markdown)
    return [problem for paragraph in paragraphs for problem in check_prose.problems_in(paragraph)]


def test_a_long_sentence_is_found_with_its_line() -> None:
    assert problems(f"# Title\n\nA short one.\n\n{LONG}.\n") == [
        "page.md:5: 31 words, at most 30: word word word word word word word word ..."
    ]


def test_a_sentence_is_counted_across_lines() -> None:
    assert len(problems("\n".join(LONG.split()))) == 1


def test_two_short_sentences_are_not_one_long_one() -> None:
    half = " ".join(["word"] * 20)
    assert problems(f"{half}. Then {half}. `then` {half}.") == []
    assert problems(f"{half}\n\n{half}\n") == []
    assert problems(f"- {half}\n- {half}\n1. {half}\n") == []


@pytest.mark.parametrize(
    "text",
    ["Requests under way.", "a position behind\nlayer 3", "The server goes on", "of the element type", "by itself"],
)
def test_a_banned_phrase_is_found_also_across_lines(text: str) -> None:
    assert len(problems(text)) == 1


def test_a_banned_phrase_is_found_as_whole_words_only() -> None:
    assert problems("The bandwidth of a plane, wholesale.") == []


@pytest.mark.parametrize(
    "text",
    [
        f"```text\n{LONG} goes on\n```\n",
        f"| column |\n|---|\n| {LONG} goes on |\n",
        f"    {LONG} goes on\n",
        f"See `{LONG} goes on`.",
        f"See [this page](goes-on-{'x' * 99}.md).",
    ],
)
def test_tables_code_and_addresses_are_not_read(text: str) -> None:
    assert problems(text) == []


def test_the_text_of_a_link_is_read() -> None:
    assert len(problems("See [what goes on](page.md).")) == 1


def test_indented_lines_of_a_help_text_are_not_read() -> None:
    text = f"A short sentence.\n\n  {LONG} goes on\n\nIt goes on."
    found = [
        problem for part in check_prose.help_paragraphs("steer x", text) for problem in check_prose.problems_in(part)
    ]
    assert found == ["steer x: 'goes on'; say: continues, resumes"]


@pytest.mark.parametrize(("markdown", "status"), [("All is well.\n", 0), (f"{LONG}\n", 1)])
def test_the_command_ends_with_a_status(tmp_path: Path, markdown: str, status: int) -> None:
    (tmp_path / "page.md").write_text(markdown)
    ran = subprocess.run([sys.executable, SCRIPT, tmp_path / "page.md"], capture_output=True, timeout=60, check=False)
    assert ran.returncode == status


def test_the_help_of_every_command_is_read_without_an_engine() -> None:
    program = (
        "import sys; sys.path[:0] = ['.ci', '.']; import check_prose\n"
        "for one in check_prose.command_paragraphs([]): print(one.where)\n"
        "assert 'torch' not in sys.modules or type(sys.modules['torch']).__name__ == '_Stub'"
    )
    read = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    assert {"steer serve --grace", "steer serve --steer-slots", "steer capture", "steer vectors sweep --plot"} <= {
        *read
    }
    assert "steer serve --gpu-memory-utilization" not in read  # vLLM's own
