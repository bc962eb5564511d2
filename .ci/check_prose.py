"""Reports sentences that are too long and phrases that have a plainer word, in Markdown files and in help texts.

    python .ci/check_prose.py README.md docs/concepts.md
    python .ci/check_prose.py --commands                 # every `steer ... --help`
    python .ci/check_prose.py --commands=generate,serve  # the help of these commands only

Tables, code blocks and `code` are not prose. The exit status is 1 if anything is found.
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import re
import sys
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

MAX_WORDS = 30
"""Words of a sentence at most."""

BANNED = {
    r"under way": "in flight, running",
    r"go(es)? on|going on|went on": "continues, resumes",
    r"tak(es?|en) up again": "resumes",
    r"by (itself|themselves)": "automatically",
    r"(is|are) none": "is not a valid ...",
    r"behind (the |a |each |every )?(decoder )?(layers?|blocks?)": "after layer L",
    r"whoever|whatever|nobody|somebody": "name the caller, client or process",
    r"so (many|much)": "a number of, this many",
    r"of (its|their|your|one's|his) own making": "client-generated",
    r"without more words": "by default",
    r"element types?": "dtype",
    r"width": "hidden size",
    r"front[ -]ends?": "API server process",
    r"strangers?": "third-party dependency",
    r"tall(y|ies)|parcels?|ledgers?|lanes?|orphans?": "the standard word",
    r"greet(s|ed|ings?)?|hears?|heard": "registers, reports, receives",
    r"regimes?": "engine configuration",
    r"figures": "results",
    r"embedded model": "bundled model",
    r"out of the way|in short order|all the same": "say it plainly",
}
"""Pattern of a phrase, between word boundaries and in any case -> what to say instead."""

STUBBED = ("accelerate", "matplotlib", "safetensors", "sklearn", "torch", "transformers", "vllm")
"""Packages that take seconds to import, or need not be installed, and that no help text needs."""

_BANNED = [(re.compile(rf"\b({pattern})\b", re.IGNORECASE), instead) for pattern, instead in BANNED.items()]
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9`*])")
_LIST_ITEM = re.compile(r"^\s*([-*+]|\d+\.)\s+")
_CODE = "`code`"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Prose without a break in it."""

    where: str
    """File and line, or command and option."""
    text: str
    """Its text on one line, with Markdown."""


def markdown_paragraphs(name: str, markdown: str) -> Iterator[Paragraph]:
    """The paragraphs, headings and list items of a Markdown text, without tables and code blocks."""
    lines: list[str] = []
    start, in_code = 0, False
    for number, line in enumerate([*markdown.splitlines(), ""], 1):
        is_fence = line.lstrip().startswith(("```", "~~~"))
        is_table = line.lstrip().startswith("|")
        is_heading = line.startswith("#")
        is_item = _LIST_ITEM.match(line) is not None
        if lines and (is_fence or is_table or is_heading or is_item or not line.strip()):
            yield Paragraph(f"{name}:{start}", " ".join(lines))
            lines = []
        in_code ^= is_fence
        if in_code or is_fence or is_table or not line.strip():
            continue
        if not lines:
            if line.startswith("    ") and not is_item:
                continue  # a code block
            start = number
        lines.append(_LIST_ITEM.sub("", line, count=1).strip("# "))
        if is_heading:
            yield Paragraph(f"{name}:{number}", lines.pop())


def help_paragraphs(where: str, text: str) -> Iterator[Paragraph]:
    """The paragraphs of a help text, in which indented lines are code or tables."""
    for part in re.split(r"\n\s*\n", text):
        prose = " ".join(line for line in part.splitlines() if not line.startswith(" "))
        if prose:
            yield Paragraph(where, prose)


def problems_in(paragraph: Paragraph) -> Iterator[str]:
    """What is wrong with a paragraph, one line for each finding."""
    text = _plain(paragraph.text)
    for sentence in _SENTENCE_END.split(text):
        words = [word for word in sentence.split() if any(letter.isalnum() for letter in word)]
        if len(words) > MAX_WORDS:
            yield f"{paragraph.where}: {len(words)} words, at most {MAX_WORDS}: {' '.join(words[:8])} ..."
    for pattern, instead in _BANNED:
        for found in pattern.finditer(text):
            yield f"{paragraph.where}: {found[0]!r}; say: {instead}"


def _plain(text: str) -> str:
    """The text with each `code` as one word, and links as their text."""
    text = re.sub(r"(`+).+?\1", _CODE, text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return text.replace("*", "")


def command_paragraphs(commands: Sequence[str]) -> Iterator[Paragraph]:
    """The help texts of `steer` and its commands; of all commands if none is named. vLLM's own flags are not read."""
    sys.meta_path.insert(0, _StubFinder())
    top = _parser_of([])
    yield from _parser_paragraphs(top)
    choices = next(action.choices for action in top._actions if action.dest == "command")
    for command in commands or tuple(choices or ()):
        yield from _parser_paragraphs(_parser_of([command]))


def _parser_of(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser that would print its help for `steer ARGUMENTS --help`."""
    parsers: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, file: object = None) -> None:
        parsers.append(parser)

    main = importlib.import_module("steer_service.cli.main").main
    with patch.object(argparse.ArgumentParser, "print_help", keep), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return parsers[0]


def _parser_paragraphs(parser: argparse.ArgumentParser) -> Iterator[Paragraph]:
    for text in (parser.description, parser.epilog, *(group.description for group in parser._action_groups)):
        yield from help_paragraphs(parser.prog, text or "")
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield from help_paragraphs(f"{parser.prog} {choice.dest}", choice.help or "")
            for part in action.choices.values():
                yield from _parser_paragraphs(part)
        yield from help_paragraphs(f"{parser.prog} {name}", action.help or "")


class _AnythingType(ABCMeta):  # so that a class may derive from Anything and from an abstract class
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=_AnythingType):
    """Stands for any class, function or decorator of an engine; has no flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what it is given."""

    def __call__(self, decorated: Any) -> Any:
        """Decorates nothing."""
        return decorated

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds none of vLLM's flags."""
        return parser


class _Stub(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs for `STUBBED`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def main() -> NoReturn:
    """Prints what is found and exits."""
    parser = argparse.ArgumentParser(description="Checks the prose of Markdown files and of help texts.")
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="a Markdown file")
    parser.add_argument("--commands", nargs="?", const="", metavar="NAMES", help="commands of steer (default: all)")
    arguments = parser.parse_args()
    paragraphs = [part for path in arguments.files for part in markdown_paragraphs(str(path), path.read_text("utf-8"))]
    if arguments.commands is not None:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        paragraphs += command_paragraphs([name for name in arguments.commands.split(",") if name])
    problems = [problem for paragraph in paragraphs for problem in problems_in(paragraph)]
    print("\n".join(problems) if problems else f"prose: {len(paragraphs)} paragraphs, nothing found")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
