"""`steer info` says what a server and its model are."""

import json
from dataclasses import asdict, replace

import pytest

from steer_service.cli.main import main
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.client.conftest import Serve, Server


def test_the_facts_of_model_and_server_are_printed(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(FAKE_MODEL, adapters=("sea", "hill"), special_token_ids=(1, 2), aliases=("other",))
    model = replace(model, max_prompt_tokens=model.max_model_len - 1)
    server = serve(FakeBackend(model))

    assert main(["info", "--address", server.address]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {name: text.strip() for name, text in lines.items()}
    assert facts["model"] == f"{model.name} (also other)"
    assert facts["adapters"] == "sea, hill"
    assert facts["layers"] == f"{model.layer_count} (0..{model.layer_count - 1})"
    assert (facts["hidden size"], facts["dtype"]) == (str(model.hidden_size), model.dtype)
    assert facts["special tokens"] == "1, 2"
    assert facts["longest sequence"].startswith("4096 tokens of prompt and output")
    assert facts["longest prompt"].startswith("4095 tokens")
    assert facts["server"].startswith("steerllm ")


def test_json_has_every_field_of_the_model(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--address", server.address, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == json.loads(json.dumps(asdict(FAKE_MODEL)))
    assert found["model_missing_reason"] == ""
    assert {"version", "instance", "instance_id", "limits", "features"} <= set(found["server"])
    assert "steering" in found["server"]["features"]


def test_without_a_server_the_command_fails_with_its_address(
    dead_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--address", dead_address]) == 1
    assert capsys.readouterr().err.startswith(f"steer: no server answers at {dead_address}")


def test_a_timeout_that_is_no_time_is_refused_by_the_name_of_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--timeout", "-1"]) == 2
    assert capsys.readouterr().err.startswith("steer: --timeout: ")
