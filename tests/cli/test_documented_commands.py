"""Every shell line of the documentation is one that works: its command, flags, target, extra and files exist."""

import argparse
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_service.cli.main import COMMANDS, MODULES

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md", "bench/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("deploy/*/README.md")),
    *sorted(ROOT.glob("examples/**/README.md")),
]
END_OF_COMMAND = {"|", "&", "&&", ";", ">", "2>", ">>", "<"}


def shell_lines(page: Path) -> Iterator[str]:
    """The commands of a page, each on one line."""
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page, without settings before it and without what it is piped to."""
    for line in shell_lines(page):
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in END_OF_COMMAND:
                words.append(word)
                continue
            while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] in {"sudo", "exec"}):
                del words[0]
            if words:
                yield words
            words = []


OF_STEER = {
    " ".join(["steer", *words[1:]]): (page.name, words[1:])
    for page in PAGES
    for words in commands(page)
    if words[0].rpartition("/")[2] == "steer"
}
"""Command line -> a page that has it, and its arguments."""


@pytest.mark.parametrize("name", sorted({arguments[0] for _, arguments in OF_STEER.values()}))
def test_the_command_lines_of_the_pages_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "serve":
        pytest.importorskip("vllm")
    assert name in COMMANDS
    parser = argparse.ArgumentParser(prog=f"steer {name}")
    importlib.import_module(f"steer_service.cli.{MODULES.get(name, name)}").add_arguments(parser)
    for line, (page, arguments) in OF_STEER.items():
        if arguments[0] != name or arguments[1:] == ["--help"]:
            continue
        try:
            parser.parse_args(arguments[1:])
        except SystemExit:
            pytest.fail(f"{page}: `{line}`: {capsys.readouterr().err}")


def test_there_are_command_lines_to_check() -> None:
    assert {"serve", "generate", "capture", "train"} <= {arguments[0] for _, arguments in OF_STEER.values()}
    assert len(OF_STEER) > 30


def test_every_target_of_make_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands(page) if words[0] == "make" and len(words) > 1}
    assert named - targets == set()
    assert "setup" in named


def test_every_extra_that_a_page_installs_exists() -> None:
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    )
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {name for listed in re.findall(r"(?:\.|steerllm)\[([a-z,-]+)\]", text) for name in listed.split(",")}
    assert named - extras == set()
    assert named


def test_every_script_that_a_page_runs_exists() -> None:
    for page in PAGES:
        for words in commands(page):
            if words[0].startswith((".ci/", "bench/", "tests/")):
                assert (ROOT / words[0]).exists(), f"{page.name}: {words[0]}"
            if words[0].startswith("python") and len(words) > 1 and words[1].endswith(".py"):
                assert (page.parent / words[1]).exists() or (ROOT / words[1]).exists(), f"{page.name}: {words[1]}"
