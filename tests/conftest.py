"""What all tests share: settings of property tests, tiny models and folders in shared memory."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import steer_client  # noqa: F401  # before a test imports grpc, which would then act in forked processes
from tests.leaks_of_a_test import Leaks

settings.register_profile("steerllm", deadline=None, max_examples=50)
settings.register_profile("few", deadline=None, max_examples=10)  # for what takes a second, as test_cuda.py
settings.load_profile("steerllm")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Leaks(), "leaks of a test")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    """Makes (once per family) the folder of a random 4-layer float32 model with the bundled model's tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        from tests.tiny_models import CONFIGS, make_model  # only tests that need a model pay for the import

        folder = root / family
        if not folder.exists():
            make_model(CONFIGS[family], folder)
        return folder

    return make


@pytest.fixture(scope="module")
def hf(model_folder):
    """The training backend on the tiny Llama."""
    import torch

    from steer_service.hf.model import HFSteeringModel

    with HFSteeringModel(model_folder("llama"), name="tiny", dtype=torch.float32) as model:
        yield model


@pytest.fixture
def shm_folder() -> Iterator[Path]:
    """A folder in /dev/shm that is gone after the test."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-") as name:
        yield Path(name)
