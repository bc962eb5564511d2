"""`steer generate` as a user meets it: what it prints, writes and returns."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_client import CaptureSite, CaptureSpec, PositionRange, SteeringSpec, spec_to_json
from steer_service.cli import generate
from steer_service.cli.arguments import positions_from
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.positions import scope_from
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.formats.checkpoint import save_spec
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from tests.client.conftest import Gate, Serve, Server

SPEC = SteeringSpec.simple_add(1, np.arange(1.0, 9.0), scale=2.0)


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser("steer generate")
    generate.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def run(*arguments: object) -> int:
    return generate.run(parsed(*arguments))


def test_options_that_are_not_given_are_the_servers() -> None:
    request = generate.request_from(parsed("p"))
    assert request.sampling == SamplingOptions()
    assert request.priority is None


def test_tokens_are_chosen_and_requests_ordered_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--bad-words", "sea", "--bad-words", "harbour", "--allowed-token-ids", "17,42", "--priority", -3)
    request = generate.request_from(parsed("p", *flags))
    assert request.sampling == SamplingOptions(bad_words=("sea", "harbour"), allowed_token_ids=(17, 42))
    assert request.priority == -3
    assert generate.request_from(parsed("p", "--stream-interval", 5)).stream_interval == 5

    assert run("p", "--allowed-token-ids", "17;42") == 2
    assert "--allowed-token-ids: '17;42' is not a list" in capsys.readouterr().err


def test_structured_outputs_are_given_as_json() -> None:
    request = generate.request_from(parsed("p", "--structured-outputs", '{"choice": ["yes", "no"]}'))
    assert request.sampling.structured_outputs == StructuredOutputs(choice=("yes", "no"))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("yes", "--structured-outputs"),
        ('{"choose": 1}', "--structured-outputs"),
        ('{"regex": ""}', "--structured-outputs.regex"),
    ],
)
def test_what_is_no_constraint_is_refused_by_name(given: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generate.request_from(parsed("p", "--structured-outputs", given))
    assert refused.value.field == field


def test_the_text_is_printed(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    status = run("a b c", "--address", server.address, "--max-tokens", 4, "--temperature", 0, "--seed", 3)

    printed = capsys.readouterr()
    assert (status, printed.err, len(printed.out.split())) == (0, "", 4)
    assert printed.out.endswith("\n")
    sampling = server.backend.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (4, 0.0, 3)


def test_json_has_log_probabilities_of_prompt_and_output(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--address", server.address, "--max-tokens", 2, "--logprobs", 1, "--prompt-logprobs", 0)
    assert run("a b", *options, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [set(one) for one in answer["logprobs"]] == [{"token_id", "logprob", "top", "text", "rank"}] * 2
    assert [top["rank"] for top in answer["logprobs"][0]["top"]] == [1]
    assert (answer["prompt_logprobs"][0], len(answer["prompt_logprobs"])) == (None, 2)

    assert run("a b", *options) == 2
    assert "--logprobs needs --json" in capsys.readouterr().err


def test_json_prints_one_object(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(
        "a b", "--address", server.address, "--max-tokens", 2, "--json", "--steering", json.dumps(spec_to_json(SPEC))
    )

    answer = json.loads(capsys.readouterr().out)
    assert status == 0
    assert answer["receipt"]["steering_digest"] == SPEC.digest()
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0}
    assert (len(answer["text"].split()), answer["finish_reason"]) == (2, "length")


def test_several_outputs_are_printed_under_headings(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("a b", "--address", server.address, "--max-tokens", 2, "--n", 3, "--seed", 1)
    assert run(*line) == 0
    printed = capsys.readouterr().out
    assert run(*line, "--json") == 0
    answer = json.loads(capsys.readouterr().out)

    texts = [output["text"] for output in answer["outputs"]]
    assert len(texts) == 3
    assert printed == "\n\n".join(f"=== output {1 + i} of 3 ===\n{text}" for i, text in enumerate(texts)) + "\n"
    assert {name: answer[name] for name in answer["outputs"][0]} == answer["outputs"][0]
    assert answer["usage"]["completion_tokens"] == 6


def test_a_timeout_ends_the_command_with_an_error(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(FakeBackend(step=Gate(2)))
    assert run("a b", "--address", server.address, "--max-tokens", 9, "--timeout", 0.2) == 1
    assert capsys.readouterr().err.startswith("steer: ")


def test_the_receipt_reports_changes_on_request(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    steered = ("a b", "--address", server.address, "--max-tokens", 2, "--steering", json.dumps(spec_to_json(SPEC)))
    change = {"positions": 3, "largest": 0.0, "mean": 0.0, "capped_positions": 0}

    assert run(*steered, "--json", "--report-change") == 0
    receipt = json.loads(capsys.readouterr().out)["receipt"]
    assert receipt["changes"] == [{"layer": layer, **change} for layer in SPEC.layers]

    for arguments in (steered, ("a b", "--json")):
        assert run(*arguments, "--report-change") == 2
        assert "--report-change needs --steering and --json" in capsys.readouterr().err


def test_a_time_budget_ends_the_text(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(FakeBackend(step=Gate(2)))

    assert run("a b", "--address", server.address, "--max-tokens", 9, "--time-budget", 0.05, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (len(answer["text"].split()), answer["finish_reason"]) == (2, "time_budget")

    assert run("a b", "--address", server.address, "--time-budget", 0) == 2
    assert "--time-budget: 0.0 is not above 0" in capsys.readouterr().err


def test_an_adapter_is_chosen_by_its_name(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(FakeBackend(replace(FAKE_MODEL, adapters=("sea",))))

    assert run("hello", "--address", server.address, "--max-tokens", 1, "--model", "sea") == 0
    assert run("hello", "--address", server.address, "--max-tokens", 1, "--model", "hill") == 1

    assert [request.model for request in server.backend.requests] == ["sea"]
    assert "steer: model: model 'hill' is not served here; 'fake', 'sea' is" in capsys.readouterr().err


def test_a_prompt_is_cut_to_its_last_tokens(server: Server) -> None:
    run("a b c d", "--address", server.address, "--truncate-prompt-tokens", 2, "--max-tokens", 1)
    run("a b c d", "--address", server.address, "--truncate-prompt-tokens", "-1", "--max-tokens", 1)
    assert [request.truncate_prompt_tokens for request in server.backend.requests] == [2, -1]


def test_steering_comes_from_a_folder_that_training_has_saved(server: Server, tmp_path: Path) -> None:
    save_spec(tmp_path / "trained", SPEC, model=server.backend.info)
    assert run("hello", "--address", server.address, "--max-tokens", 1, "--steering", tmp_path / "trained") == 0
    assert server.backend.requests[0].steering == SPEC


def test_a_folder_without_steering_is_refused(server: Server, tmp_path: Path) -> None:
    assert run("hello", "--address", server.address, "--steering", tmp_path) != 0
    assert server.backend.requests == []


def test_steering_comes_from_a_file_and_its_vectors_from_beside_it(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "direction.npy", np.arange(1.0, 9.0))
    operations = [{"op": "cap", "vector": {"file": "direction.npy"}, "max": 1.5}]
    (tmp_path / "spec.json").write_text(json.dumps({"layers": {"2": operations}}))

    status = run("hello", "--address", server.address, "--max-tokens", 1, "--steering", tmp_path / "spec.json")

    assert status == 0
    [cap] = server.backend.requests[0].steering.layers[2].operations
    assert (cap.vector.tolist(), cap.min, cap.max) == (list(range(1, 9)), None, 1.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captures_are_written_as_float32_with_the_name_of_their_type(serve: Serve, tmp_path: Path, dtype: str) -> None:
    server = serve(FakeBackend(replace(FAKE_MODEL, dtype=dtype)))
    out = tmp_path / "states.npz"

    status = run("a b c", "--address", server.address, "--max-tokens", 4, "--capture", "0,2-3", "--out", out)

    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    assert status == 0
    told = ["is_generated", "is_steered", "positions", "token_ids"]
    assert sorted(arrays) == sorted(["dtype", "layer_0", "layer_2", "layer_3", *told])
    assert arrays["positions"].tolist() == list(range(6))
    assert arrays["is_generated"].tolist() == [False] * 3 + [True] * 3
    assert not arrays["is_steered"].any()
    assert str(arrays["dtype"]) == dtype
    assert arrays["layer_2"].dtype == np.float32
    expected = [(2, position, token) for position, token in enumerate(arrays["token_ids"])]
    assert [decode_row(row) for row in arrays["layer_2"]] == expected
    assert len(expected) == 6


def test_rows_are_chosen_by_position(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "states.npz"

    status = run(
        *("a b c d", "--address", server.address, "--max-tokens", 3),
        *("--steering", json.dumps(spec_to_json(SPEC)), "--steer-positions", "generated,-1"),
        *("--capture", "1", "--capture-positions=0..1,-1..4", "--capture-site", "both"),
        *("--capture-dtype", "float32", "--out", out),
    )

    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    assert status == 0
    request = server.backend.requests[0]
    assert request.steering == replace(SPEC, positions=["generated", -1])
    assert request.capture == CaptureSpec(
        layers=(1,), site=CaptureSite.BOTH, positions=[range(2), PositionRange(-1, 4)], dtype="float32"
    )
    assert arrays["positions"].tolist() == [0, 1, 3, 4]
    assert arrays["is_steered"].tolist() == [False, False, True, True]
    for name in ("layer_1", "layer_1_before"):
        assert [decode_row(row)[1] for row in arrays[name]] == [0, 1, 3, 4]
    assert [row[5] for row in (arrays["layer_1"][0], arrays["layer_1_before"][0])] == [0, 1]


def test_captured_rows_become_one(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "states.npz"
    flags = ("--capture", "1", "--capture-pooling", "last", "--capture-positions", "1..2", "--out", out)

    assert run("a b c d", "--address", server.address, "--max-tokens", 1, *flags) == 0

    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    assert [decode_row(row)[1] for row in arrays["layer_1"]] == [2]
    assert arrays["positions"].tolist() == [1, 2]
    assert "is_steered" not in arrays


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("prompt", "prompt"),
        ("prompt, generated", ["prompt", "generated"]),
        ("-1", -1),
        ("3", 3),
        ("..4", range(5)),
        ("4..", PositionRange(4)),
        ("-4..-1", range(-4, 0)),
        ("0..-1", PositionRange(0, -1)),
        ("..", PositionRange(0)),
        ("generated[0:8],-1", ["generated[0:8]", -1]),
        ("messages[-1],roles[user], skip_special_tokens", ["messages[-1]", "roles[user]", "skip_special_tokens"]),
    ],
)
def test_positions_are_written_briefly(written: str, words: object) -> None:
    assert positions_from("--steer-positions", written) == scope_from(words)


def test_positions_that_the_request_cannot_have_are_refused_by_the_server(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(
        *("a b", "--address", server.address, "--max-tokens", 2),
        *("--steering", json.dumps(spec_to_json(SPEC)), "--steer-positions", "-3"),
    )

    assert status == 1
    assert capsys.readouterr().err == (
        "steer: steering.positions.ranges[0]: position -3 lies before the beginning of a prompt of 2 tokens\n"
    )


def test_no_server_is_one_plain_sentence(dead_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = run("hello", "--address", dead_address)

    assert status == 1
    assert (
        capsys.readouterr().err
        == f"steer: no server answers at {dead_address}: the connection is refused; `steer serve` starts one.\n"
    )


def test_a_refusal_is_one_line_with_the_field(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_to_json(SteeringSpec.simple_add(9, [1.0] * 8))

    status = run("hello", "--address", server.address, "--steering", json.dumps(spec))

    assert status == 1
    assert capsys.readouterr().err == (
        "steer: steering.layers[9]: Layer index 9 out of range [0, 4). Model fake has 4 layers.\n"
    )


def test_a_failure_under_way_keeps_what_was_printed(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(FakeBackend(failure=EngineFailed("the engine died"), fail_at=2))

    status = run("hello", "--address", server.address)

    printed = capsys.readouterr()
    assert (status, len(printed.out.split()), printed.err) == (1, 2, "steer: the engine died\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", "--max-tokens", "1"], "steer: prompt.text: the prompt is empty"),
        (["hi", "--max-tokens", "-1"], "steer: --max-tokens: -1 is outside 0..2147483647"),
        (["hi", "--capture", "1"], "steer: --capture and --out go together"),
        (["hi", "--out", "x.npz"], "steer: --capture and --out go together"),
        (["hi", "--capture", "1,x", "--out", "x.npz"], "steer: --capture: 'x' is not a layer or a range such as 7-9"),
        (["hi", "--capture", "9-7", "--out", "x.npz"], "steer: --capture: '9-7' is not a range of layers"),
        (
            ["hi", "--steering", '{"layers": {"-1": []}}'],
            "steer: steering.layers[-1]: layer -1 is negative; layers count from 0: counted from the end it is",
        ),
        (
            ["hi", "--capture=-1", "--out", "x.npz", "--address", "127.0.0.1:1"],
            "steer: --capture: layer -1 is negative; layers count from 0: counted from the end it is",
        ),
        (["hi", "--capture", "1", "--out", "x.safetensors"], "steer: --out: x.safetensors does not end in .npz"),
        (["hi", "--capture", "1", "--out", "/nowhere/x.npz"], "steer: --out: /nowhere is not a folder"),
        (["hi", "--steer-positions", "prompt"], "steer: --steer-positions needs --steering"),
        (["hi", "--capture-site", "both"], "steer: --capture-site needs --capture"),
        (["hi", "--capture-dtype", "float32"], "steer: --capture-dtype needs --capture"),
        (["hi", "--capture-pooling", "mean"], "steer: --capture-pooling needs --capture"),
        (["hi", "--stream-interval=-1"], "steer: --stream-interval: -1 is not an integer in 0..2^31-1"),
        (
            ["hi", "--capture", "1", "--out", "x.npz", "--capture-positions", "1-3"],
            "steer: --capture-positions: '1-3' is not prompt, generated, a position, 4..9, generated[0:8], messages",
        ),
        (
            ["hi", "--capture", "1", "--out", "x.npz", "--capture-positions", "5..4"],
            "steer: capture.positions: positions 5 to 4 are reversed",
        ),
        (
            ["hi", "--capture", "1", "--out", "x.npz", "--capture-dtype", "float64"],
            "steer: capture.dtype: dtype 'float64' is not one of",
        ),
        (
            ["hi", "--steering", '{"layers": {}, "positions": "prompt"}', "--steer-positions", "-1"],
            "steer: --steer-positions: the steering document has positions already",
        ),
        (["hi", "--steering", "no-such-file"], "steer: --steering: no-such-file is neither a JSON object nor"),
        (
            ["hi", "--steering", '{"layers": {"1": [{"op": "sub"}]}}'],
            "steer: steering.layers[1].operations[0].op: op 'sub'",
        ),
        (["hi", "--address", "http://host"], "steer: address: 'http://host' is a URL"),
    ],
)
def test_bad_usage_is_one_line_and_needs_no_server(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(*arguments)

    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(said)
