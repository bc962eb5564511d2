"""A server whose backend captures into shared memory."""

import pytest

from tests.cli.capture.command import fake
from tests.client.conftest import Serve, Server


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve(fake())
