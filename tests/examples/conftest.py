"""A server around the fake backend, and places in shared memory for what it holds."""

import pytest

from tests.examples.node import Segments
from tests.server.conftest import serve

__all__ = ["segments", "serve"]  # fixtures


@pytest.fixture
def segments() -> Segments:
    return Segments()
