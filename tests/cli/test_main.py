"""The `steer` command itself: its help, its versions, its suggestions, and how fast it starts."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from steer_service.cli.exit_status import BAD_USAGE
from steer_service.cli.main import COMMANDS, main

SLOW = {"numpy", "grpc", "torch", "vllm", "transformers", "asyncio"}
"""Modules whose import takes a tenth of a second and more."""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_help_has_one_line_for_each_command_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = printed(capsys, "--help")
    lines = text.splitlines()
    assert status == 0
    assert len(lines) <= 32
    for name, what in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines].count([name, what]) == 1
    assert "examples:" in lines
    assert "exit status: 0 success, 1 failure, 2 wrong command line, file or environment, 130 ended by Ctrl-C" in lines


def test_without_a_command_the_help_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, error = printed(capsys)
    assert (status, text) == (2, "")
    assert "commands:" in error


def test_the_version_is_printed_and_with_verbose_those_of_what_results_depend_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printed(capsys, "--version") == (0, f"steerllm {version('steerllm')}\n", "")
    for arguments in (["--version", "-v"], ["-v", "--version"]):
        _, text, _ = printed(capsys, *arguments)
        names = dict(line.split(" ", 1) for line in text.splitlines())
        assert names["grpcio"] == version("grpcio")
        assert names["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["serv"], "serve"),
        (["generat"], "generate"),
        (["generate", "p", "--temprature", "0"], "--temperature"),
        (["generate", "p", "--temprature=0"], "--temperature"),
        (["vectors", "inspekt", "x"], "inspect"),
        (["capture", "p", "--layers", "1", "--out", "x", "--concurency", "3"], "--concurrency"),
    ],
    ids=" ".join,
)
def test_an_unknown_name_is_answered_with_the_nearest_one(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, error = printed(capsys, *arguments)
    assert (status, text) == (2, "")
    first, last = error.splitlines()
    assert first.endswith(f"; did you mean {near}?")
    assert re.fullmatch(r"see `steer( [a-z]+)* --help`", last)


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["capture"], ["token"], ["healthcheck"], ["vectors", "inspect"]], ids=" ".join
)
def test_a_wrong_flag_is_two_lines_that_name_the_help_of_the_command(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, error = printed(capsys, *command, "--no-such-flag=1")
    prog = " ".join(["steer", *command])
    assert (status, text) == (2, "")
    assert re.fullmatch(rf"{prog}: error: .*\nsee `{prog} --help`\n", error), error


def test_a_name_that_is_near_to_none_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["xyzzy"], ["generate", "p", "--qqqqqq"]):
        _, _, error = printed(capsys, *arguments)
        assert "did you mean" not in error


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--version", "-v"]], ids=" ".join)
def test_help_and_version_import_nothing_slow(arguments: list[str]) -> None:
    assert imported_by(*arguments) & SLOW == set()


@pytest.mark.parametrize("command", ["serve", "generate", "capture", "render", "info"])
def test_the_help_of_a_command_imports_neither_torch_nor_vllm(command: str) -> None:
    assert imported_by(command, "--help") & {"torch", "vllm", "transformers", "matplotlib", "sklearn"} == set()


def imported_by(*arguments: str) -> set[str]:
    """The top modules that a process of the command imports."""
    program = f"""if True:
        import contextlib, io, sys
        from steer_service.cli.main import main
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main({list(arguments)!r})
        print(*{{name.partition(".")[0] for name in sys.modules}})
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]], ids=" ".join)
def test_a_pipe_whose_reader_has_gone_is_quiet(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "steer_service.cli", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.stderr == ""


def test_a_process_that_loaded_torch_ends_without_its_teardown() -> None:
    program = """if True:
        import atexit, sys, types
        from steer_service.cli.main import main
        sys.modules["torch"] = types.ModuleType("torch")
        atexit.register(print, "handled")
        sys.argv = ["steer", *sys.argv[1:]]
        main()
        print("not reached")
    """
    ended = [
        subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
        for words in (["--version"], [])
    ]
    assert [done.returncode for done in ended] == [0, BAD_USAGE]
    assert ended[0].stdout.startswith("steerllm ")
    assert [done.stdout.splitlines()[-1] for done in ended] == ["handled", "handled"]


def test_ctrl_c_while_modules_are_imported_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["generate", "hi"]) == 130
