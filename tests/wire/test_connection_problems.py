"""Texts of gRPC versions that are not installed here, and what they say about the connection."""

import pytest

from steer_service.wire.connection_problems import ConnectionProblem, problem_in


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("UNKNOWN: ipv4:127.0.0.2:1: Peer name 127.0.0.2 is not in peer certificate", ConnectionProblem.WRONG_NAME),
        ("UNAVAILABLE: Trying to connect an http1.x server (HTTP status 503)", ConnectionProblem.NOT_HTTP2),
    ],
)
def test_the_texts_of_grpc_1_76_are_known(text: str, problem: ConnectionProblem) -> None:
    assert problem_in(f"failed to connect to all addresses; last error: {text}") is problem
