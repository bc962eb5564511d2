"""`steer capture` run again in a folder: after it was killed, stopped or changed."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from steer_client import (
    SteeringSpec,
    load_captures,
    spec_to_json,
)
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.cli.capture.command import (
    TINY_SHARD,
    Permits,
    command,
    errors_in,
    expect,
    fake,
    run,
    texts,
    words,
    write_lines,
)
from tests.client.conftest import BOUND_S, Serve, Server


def test_a_run_that_is_killed_goes_on_without_loss_or_duplicates(serve: Serve, tmp_path: Path):
    permits = Permits()
    server = serve(fake(step=permits))
    lines = [*texts(40), "ends", "here"]
    lines[13] = words(5000, 13)  # too long
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", "1", "--out", tmp_path / "out", *TINY_SHARD)
    arguments += ("--concurrency", 2)  # when p prompts are finished there, all but two of them were taken here

    for more in (0, 2, 11, 7, 9):
        permits.left = 0
        finished = server.backend.finished
        with command(*arguments) as process:
            server.wait_running(1)
            permits.left = more
            server.wait_until(lambda: server.backend.finished - finished >= more)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            process.wait(BOUND_S)
        server.wait_idle()
    covered = [shard.about["prompts"][1] for shard in load_captures(tmp_path / "out")]
    assert covered  # some had come, not all
    assert covered[-1] < 40
    permits.left = 1000

    assert run(*arguments) == 1
    expected = expect(lines)
    del expected.prompts[13]
    expected.check(tmp_path / "out")
    assert [error["prompt_index"] for error in errors_in(tmp_path / "out")] == [13]
    known = {"manifest.jsonl", "errors.jsonl"}
    known |= {f"capture-{n:05d}.{kind}" for n in range(len(covered) + 50) for kind in ("jsonl", "safetensors")}
    assert {path.name for path in (tmp_path / "out").iterdir()} <= known


@pytest.fixture
def half(server: Server, tmp_path: Path) -> Iterator[tuple[list[str], tuple[object, ...]]]:
    """The prompts and the command line of a run of which the first half has been done, in several shards."""
    lines = texts(40)
    prompts = write_lines(tmp_path / "prompts.txt", lines[:20])
    arguments = (prompts, "--address", server.address, "--layers", "1", "--out", tmp_path / "out", *TINY_SHARD)
    assert run(*arguments) == 0
    write_lines(prompts, lines)
    return lines, arguments


def test_what_a_killed_run_left_is_removed_and_nothing_else(half, tmp_path: Path):
    lines, arguments = half
    out = tmp_path / "out"
    number = len(list(load_captures(out)))
    for name in (f"capture-{number:05d}.safetensors", f"capture-{number:05d}.jsonl.part", "errors.jsonl.part"):
        (out / name).write_bytes(b"half of a")
    (out / "notes.txt").write_text("mine")
    (out / "capture-99999.safetensors").write_text("mine")
    with (out / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"shard": "capture-000')

    assert run(*arguments) == 0

    expect(lines).check(out)
    assert not list(out.glob("*.part"))
    assert (out / "notes.txt").read_text() == (out / "capture-99999.safetensors").read_text() == "mine"


def test_a_finished_run_does_nothing_again(half, server: Server, tmp_path: Path):
    lines, arguments = half
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    asked = len(server.backend.requests)

    assert run(*arguments) == 0

    assert len(server.backend.requests) == asked == len(lines)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--layers", "1,2"), "with --layers 1; this run is with --layers 1,2"),
        (("--positions=-1",), "without --positions; this run is with --positions=-1"),
        (("--site", "both"), "with --site after; this run is with --site both"),
        (("--max-tokens", "2"), "with --max-tokens 0; this run is with --max-tokens 2"),
        (
            ("--seed", "1", "--truncate"),
            "without --truncate, without --seed; this run is with --truncate, with --seed 1",
        ),
        (("--no-special-tokens",), "without --no-special-tokens; this run is with --no-special-tokens"),
        (("--truncate-prompt-tokens=-1",), "prompt-tokens; this run is with --truncate-prompt-tokens=-1"),
        (("--context", "8"), "without --context, without --stride; this run is with --context 8, with --stride 4"),
    ],
)
def test_other_arguments_are_refused(half, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]):
    _, arguments = half
    capsys.readouterr()

    assert run(*arguments, *more) == 2

    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("steer: --out: ")
    assert error.endswith("; choose another folder\n")
    assert error.count("\n") == 1


def test_another_model_and_another_steering_are_refused(
    half,
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
):
    _, arguments = half
    other = serve(fake(replace(FAKE_MODEL, name="other")))

    assert run(*arguments, "--address", other.address) == 2
    assert "was filled with the model fake; this run is with the model other;" in capsys.readouterr().err
    assert run(*arguments, "--steering", json.dumps(spec_to_json(SteeringSpec.simple_add(1, [1.0] * 8)))) == 2
    assert "was filled without --steering; this run is with the --steering " in capsys.readouterr().err


def test_an_adapter_is_chosen_noted_and_not_mixed_with_another(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server = serve(fake(replace(FAKE_MODEL, adapters=("sea", "hill"))))
    lines = texts(3)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    assert run(*arguments, "--model", "sea") == 0
    expect(lines).check(tmp_path / "out")
    assert {request.model for request in server.backend.requests} == {"sea"}
    about = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert (about["model"], about["adapter"]) == ("fake", "sea")

    hill, none = "with the adapter hill (--model)", "without an adapter"
    for more, asked in ((("--model", "hill"), hill), ((), none), (("--model", "fake"), none)):
        assert run(*arguments, *more) == 2
        assert f"with the adapter sea (--model); this run is {asked}" in capsys.readouterr().err
    assert run(*arguments, "--model", "sea") == 0
    assert run(*arguments, "--model", "dale") == 1
    assert "model 'dale' is not served here" in capsys.readouterr().err


def test_the_model_may_be_named_and_is_the_same_without_its_name(half, tmp_path: Path):
    lines, arguments = half

    assert run(*arguments, "--model", "fake") == 0

    expect(lines).check(tmp_path / "out")


def test_other_prompts_are_refused(half, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines, arguments = half
    capsys.readouterr()
    for changed in ([*lines[:3], "changed", *lines[4:]], lines[:10], []):
        write_lines(tmp_path / "prompts.txt", changed)
        assert run(*arguments) == 2
        said = f"steer: --out: {tmp_path / 'out'} covers 20 prompts, which are not those that PROMPTS begins with\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["capture-00000.safetensors", "capture-00000.jsonl", "errors.jsonl"])
def test_a_folder_without_a_manifest_is_not_written_over(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    (tmp_path / name).write_text("mine")
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path) == 2
    assert f"holds {name}, but no manifest describes it" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    "mine",
    [
        "mine, without a line end",
        '{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}',
        '{"format": "steerllm-captures"}\n5\n{"prompts": [0',
        "[" * 100_000 + "\n",
    ],
)
def test_a_manifest_of_something_else_stays_as_it_is(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], mine: str
):
    (tmp_path / "manifest.jsonl").write_text(mine)
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path) == 2
    assert "manifest.jsonl is not a manifest of captures" in capsys.readouterr().err
    assert (tmp_path / "manifest.jsonl").read_text() == mine


@pytest.mark.parametrize("half_head", ["", '{"for', '{"format": "steerllm-captures", "version": 1, "mod'])
def test_a_run_that_was_killed_at_its_very_start_begins_anew(server: Server, tmp_path: Path, half_head: str):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text(half_head)
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", out) == 0
    expect(texts(3)).check(out)


def test_two_runs_do_not_write_to_one_folder(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    server = serve(fake(step=Permits()))
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    with command(*arguments):
        server.wait_running(1)
        assert run(*arguments) == 2
    assert "another process writes to" in capsys.readouterr().err


def test_ctrl_c_keeps_what_has_come_and_says_how_to_go_on(serve: Serve, tmp_path: Path):
    permits = Permits()
    server = serve(fake(step=permits))
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    with command(*arguments, "--concurrency", 1) as process:
        permits.left = 9
        server.wait_until(lambda: server.backend.finished == 9 and server.backend.running == 1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=BOUND_S)

    assert process.returncode == 130
    assert f"steer: stopped; {tmp_path / 'out'} covers 9 prompts, the same command resumes there" in error
    assert "Traceback" not in error
    expect(lines[:9]).check(tmp_path / "out")
    server.wait_idle()
    permits.left = 100
    assert run(*arguments) == 0
    expect(lines).check(tmp_path / "out")


def test_a_disk_without_room_is_one_sentence_and_no_loss(server: Server, tmp_path: Path):
    lines = texts(60)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", "0-3", "--out", tmp_path / "out", "--shard-mb", 0.02)

    with command(*arguments, before=("bash", "-c", 'ulimit -f 8; exec "$@"', "limited")) as process:
        _, error = process.communicate(timeout=BOUND_S)

    assert process.returncode == 1
    assert "File too large" in error
    assert "Traceback" not in error
    assert run(*arguments) == 0
    expect(lines, layers=(0, 1, 2, 3)).check(tmp_path / "out")
