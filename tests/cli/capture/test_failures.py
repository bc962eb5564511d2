"""`steer capture` with wrong prompts, wrong options, and servers that refuse or are lost."""

from pathlib import Path

import pytest

from steer_client import (
    EngineFailed,
    Overloaded,
)
from steer_service.cli.capture.prompts import is_binary
from tests.cli.capture.command import (
    Expected,
    Permits,
    command,
    errors_in,
    expect,
    fake,
    run,
    texts,
    tokens_of,
    words,
    write_lines,
)
from tests.client.conftest import Serve, Server


def test_a_prompt_that_fails_is_noted_and_does_not_stop_the_others(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines: list[object] = [
        {"text": "a b"},
        "{no json",
        {"text": words(5000, 2), "id": "long"},
        {"token_ids": [99_999]},
        {"id": 4},
        {"text": "a", "token_ids": [1]},
        {"messages": [{"role": "user", "text": "hi"}]},
        {"text": "", "id": ["x"]},
        {"text": "c d"},
    ]
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    for _ in range(2):
        assert run(*arguments) == 1
        assert (
            f"steer: 7 prompts failed; {tmp_path / 'out' / 'errors.jsonl'} has the reasons\n" in capsys.readouterr().err
        )
        Expected({0: tokens_of("a b"), 8: tokens_of("c d")}).check(tmp_path / "out")
        errors = errors_in(tmp_path / "out")
        assert [error["prompt_index"] for error in errors] == list(range(1, 8))
        assert [error["line"] for error in errors] == list(range(2, 9))
        assert [error["id"] for error in errors] == [None, "long", None, 4, None, None, None]
        assert {error["error"] for error in errors} == {"InvalidRequest"}
        assert [error["reason"] for error in errors[:2]] == ["BAD_JSON", "PROMPT_TOO_LONG"]
        assert errors[5]["field"] == "messages[0]"


def test_fail_fast_stops_at_the_first_and_the_prompt_may_be_mended(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = ["a b", "c", words(5000, 2), "d e"]
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    assert run(*arguments, "--fail-fast") == 1
    assert "steer: prompt 2 (line 3) failed: " in capsys.readouterr().err
    expect(lines[:2]).check(tmp_path / "out")
    write_lines(prompts, mended := [*lines[:2], "shorter", "d e"])
    assert run(*arguments) == 0
    expect(mended).check(tmp_path / "out")
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_a_failure_of_the_engine_is_of_its_prompt(serve: Serve, tmp_path: Path):
    server = serve(fake(failure=EngineFailed("a row is not finite", reason="NON_FINITE_ROW")))
    prompts = write_lines(tmp_path / "prompts.txt", ["a", "b"])

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 1
    assert [(error["error"], error["reason"]) for error in errors_in(tmp_path / "out")] == [
        ("EngineFailed", "NON_FINITE_ROW")
    ] * 2


def test_a_server_without_room_is_asked_again(serve: Serve, tmp_path: Path):
    server = serve(fake(), max_concurrent_requests=1, retry_after_s=0.0)
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0
    expect(lines).check(tmp_path / "out")


def test_a_response_stream_that_was_read_too_slowly_is_asked_for_again(serve: Serve, tmp_path: Path):
    ends = [Overloaded("nothing was read for 30 s", reason="SLOW_READER")]

    async def end_once(_: int) -> None:
        if ends:
            raise ends.pop()

    server = serve(fake(step=end_once))
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0
    expect(texts(3)).check(tmp_path / "out")


def test_a_server_that_comes_back_is_asked_again(
    serve: Serve,
    short_folder: str,
    tmp_path: Path,
):
    address = f"unix:{short_folder}/socket"
    permits = Permits()
    first = serve(fake(step=permits), address)
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)

    with command(prompts, "--address", address, "--layers", 1, "--out", tmp_path / "out") as process:
        permits.left = 11
        first.wait_until(lambda: first.backend.finished == 11)
        first.stop()
        serve(fake(), address)
        _, error = process.communicate(timeout=30)

    assert process.returncode == 0, error
    assert "; trying again for 120 s" in error
    expect(lines).check(tmp_path / "out")


def test_retries_end(serve: Serve, short_folder: str, tmp_path: Path):
    address = f"unix:{short_folder}/socket"
    first = serve(fake(step=Permits()), address)
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    with command(
        prompts, "--address", address, "--layers", 1, "--out", tmp_path / "out", "--retry-timeout", 0.01
    ) as process:
        first.wait_running(1)
        first.stop()
        _, error = process.communicate(timeout=30)

    assert process.returncode == 1
    assert error.splitlines()[-2:] == [
        f"steer: stopped; {tmp_path / 'out'} covers 0 prompts, the same command resumes there",
        f"steer: no server answers at {address}: there is no such socket; `steer serve` starts one.",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.txt",), "steer: PROMPTS: nowhere.txt is not a file\n"),
        (("image.png",), "steer: PROMPTS: image.png is not a text file in UTF-8\n"),
        (("wide.txt",), "steer: PROMPTS: wide.txt is not a text file in UTF-8\n"),
        (("prompts.txt", "--layers", "x"), "steer: --layers: 'x' is not a layer or a range such as 7-9\n"),
        (("prompts.txt", "--positions", "9..8"), "steer: capture.positions: positions 9 to 8 are reversed\n"),
        (
            ("prompts.txt", "--positions", "generated"),
            "steer: --positions: the last token is never fed to the model; generated needs --max-tokens 2\n",
        ),
        (("prompts.txt", "--concurrency", "0"), "steer: --concurrency: 0 is not above 0\n"),
        (("prompts.txt", "--shard-mb", "nan"), "steer: --shard-mb: nan is not above 0\n"),
        (("prompts.txt", "--steer-positions", "0"), "steer: --steer-positions needs --steering\n"),
        (("prompts.txt", "--address", "http://x"), "steer: address: 'http://x' is a URL; write host:port or"),
    ],
)
def test_bad_usage_is_one_line_and_needs_no_server(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("prompts.txt"), ["a"])
    Path("image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\n\n")
    Path("wide.txt").write_text("a", encoding="utf-16")

    assert run(arguments[0], "--layers", "1", "--out", "out", *arguments[1:]) == 2

    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--layers", "4"), "steer: capture.layers[0]: Capture layer index 4 is out of range."),
        (("--dtype", "float16"), "steer: capture.dtype: the residual stream of fake is captured as float32"),
    ],
)
def test_what_every_prompt_would_meet_is_said_once(
    server: Server, more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out", *more) == 1

    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_negative_layer_is_explained_with_the_layers_of_the_model(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = write_lines(tmp_path / "prompts.txt", texts(1))

    assert run(prompts, "--address", server.address, "--layers=0,-1", "--out", tmp_path / "out") == 2

    said = "steer: --layers: layer -1 is negative; layers count from 0: this model has 4, so -1 would be 3\n"
    assert capsys.readouterr().err == said


def test_a_line_of_another_encoding_fails_alone(server: Server, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"a b\ncaf\xe9\nc d\n")

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 1

    assert [(error["line"], error["reason"]) for error in errors_in(tmp_path / "out")] == [(2, "BAD_TEXT")]


def test_text_with_a_zero_character_is_text(tmp_path: Path) -> None:
    """The bytes by which a file is judged end within a character."""
    (tmp_path / "prompts.txt").write_text("\0" + "€" * 4000, encoding="utf-8")
    assert not is_binary(tmp_path / "prompts.txt")


def test_no_server_is_one_plain_sentence(dead_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", dead_address, "--layers", 1, "--out", tmp_path / "out") == 1
    assert (
        capsys.readouterr().err
        == f"steer: no server answers at {dead_address}: the connection is refused; `steer serve` starts one.\n"
    )
    assert not (tmp_path / "out").exists()
