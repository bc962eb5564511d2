"""Environment variables: the table is complete, and an unknown name is reported with the closest known one."""

import dataclasses
import re
from pathlib import Path

import pytest

from steer_service.core.environment import PREFIX, RENAMED, VARIABLES, unknown_variable_warnings
from steer_service.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "steer_service" / "core" / "environment.py"
PRODUCT = [
    *(path for folder in ("steer_service", "steer_client", "bench") for path in (ROOT / folder).rglob("*.py")),
    *(path for path in (ROOT / ".ci").iterdir() if path.is_file()),
]
OF_THE_SERVER = {PREFIX + field.name.upper() for field in dataclasses.fields(ServerConfig)}


def names_in_product_code() -> set[str]:
    texts = [path.read_text() for path in PRODUCT if path != TABLE]
    return {name for text in texts for name in re.findall(rf"\b{PREFIX}[A-Z0-9_]+", text)} - {PREFIX + "X"}


def test_the_table_has_every_variable_that_is_read_and_no_other() -> None:
    assert names_in_product_code() | OF_THE_SERVER == set(VARIABLES)


def test_a_renamed_variable_has_a_name_of_today() -> None:
    assert set(RENAMED.values()) <= set(VARIABLES)
    assert not set(RENAMED) & set(VARIABLES)


def test_known_variables_and_those_of_others_give_no_warning() -> None:
    others = {"PATH": "/bin", "STEERLLM": "1", "MY_STEERLLM_ADDRESS": "x", "STEERLLM_TEST_CUDA": "1"}
    assert unknown_variable_warnings({**dict.fromkeys(VARIABLES, "1"), **others}) == []


def test_what_kubernetes_sets_for_services_gives_no_warning() -> None:
    links = {
        "STEERLLM_SERVICE_HOST": "10.0.0.7",
        "STEERLLM_SERVICE_PORT": "50051",
        "STEERLLM_SERVICE_PORT_GRPC": "50051",
        "STEERLLM_PORT": "tcp://10.0.0.7:50051",
        "STEERLLM_PORT_50051_TCP": "tcp://10.0.0.7:50051",
        "STEERLLM_PORT_50051_TCP_ADDR": "10.0.0.7",
        "STEERLLM_CANARY_SERVICE_HOST": "10.0.0.8",
        "STEERLLM_CANARY_PORT": "tcp://10.0.0.8:50051",
    }
    assert unknown_variable_warnings(links) == []
    assert len(unknown_variable_warnings({"STEERLLM_PORT": "50051"})) == 1


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("STEERLLM_ADRESS", "STEERLLM_ADDRESS"),
        ("STEERLLM_SHM_TTL_S", "STEERLLM_SHM_TTL"),
        ("STEERLLM_MAX_SHM_GIB", "STEERLLM_MAX_SHM_GB"),
        ("STEERLLM_metrics_port", "STEERLLM_METRICS_PORT"),
        ("STEERLLM_STALL_S", "STEERLLM_SEND_TIMEOUT_S"),
        ("STEERLLM_STAL_S", "STEERLLM_SEND_TIMEOUT_S"),
    ],
)
def test_a_misspelt_or_former_name_is_reported_with_the_close_one(name: str, close: str) -> None:
    assert unknown_variable_warnings({name: "1"}) == [f"{name} is not a known variable; did you mean {close}?"]


def test_a_name_that_is_close_to_none_is_reported_alone() -> None:
    assert unknown_variable_warnings({"STEERLLM_QQQ": "1"}) == ["STEERLLM_QQQ is not a known variable"]


def test_unknown_variables_are_reported_by_name() -> None:
    warnings = unknown_variable_warnings({"STEERLLM_ZZZ": "1", "STEERLLM_QQQ": "1", "STEERLLM_": ""})
    assert [warning.split()[0] for warning in warnings] == ["STEERLLM_", "STEERLLM_QQQ", "STEERLLM_ZZZ"]
