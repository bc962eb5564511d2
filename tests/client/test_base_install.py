"""The base install, in an empty environment: the client imports and works without torch, vLLM and transformers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.conftest import Server

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "bench", "docs")
"""What a build does not need."""
SET_UP_S = 300.0
"""Seconds that making the environment may take; the slow part is the package index."""

PROGRAM = """
import asyncio, importlib.util, sys

import numpy as np
from steer_client import AsyncSteerClient, InvalidRequest, SteerClient, SteeringSpec

for name in ("torch", "vllm", "transformers"):
    assert importlib.util.find_spec(name) is None, name + " is there"


async def main(address):
    model = AsyncSteerClient(address)
    spec = SteeringSpec.simple_add(layer=2, vector=np.ones(model.hidden_size), scale=2.0)
    texts, handles = await model.generate("a b c", max_tokens=4, steering_spec=spec, capture_layers=[2])
    async with handles[0] as handle:
        await handle.fetch()
        assert handle.captures[2][0]["hidden"].shape == (6, model.hidden_size)
    await model.close()
    return texts


texts = asyncio.run(main(sys.argv[1]))
with SteerClient(sys.argv[1]) as client:
    assert client.generate("a b c", max_tokens=4)[0] == texts
    try:
        client.generate("a", steering_spec=SteeringSpec.simple_add(9, np.ones(8)))
    except InvalidRequest as error:
        print(error.field)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the base install and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=SET_UP_S)
    python = folder / "venv" / "bin" / "python"
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)  # a build leaves its outputs beside the source
    arguments = ["install", "--quiet", "--disable-pip-version-check", "--no-input", source]
    subprocess.run([python, "-m", "pip", *arguments], check=True, timeout=SET_UP_S, cwd=folder)
    return python


@pytest.mark.slow
def test_the_client_needs_the_base_install_only(python: Path, server: Server, tmp_path: Path) -> None:
    answer = subprocess.run(
        [python, "-c", PROGRAM, server.address], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "steering.layers[9]\n", "")


@pytest.mark.slow
def test_the_command_generates_with_the_base_install_only(python: Path, server: Server, tmp_path: Path) -> None:
    command = ["generate", "a b c", "--address", server.address, "--max-tokens", "4"]
    answer = subprocess.run(
        [python.with_name("steer"), *command], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )

    assert (answer.returncode, len(answer.stdout.split()), answer.stderr) == (0, 4, "")
