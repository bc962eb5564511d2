"""grpc-web through Envoy, by hand over HTTP/1.1 and TLS, and the rules for pages of other origins."""

import ssl
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message

import pytest

from steer_service.testing.fake_backend import token_at
from steer_service.wire.generation_pb2 import GenerateResponse
from tests.deploy.conftest import Fleet
from tests.deploy.fleet import BOUND_S
from tests.server.served import text_request

ORIGIN = "https://app.example"
"""The one in the file that is shipped."""
STATUS = 0x80
"""Kind of the frame with the status, which HTTP/1.1 has no trailers for."""


def call(fleet: Fleet, path: str, body: bytes | None, method: str = "POST", **headers: str) -> tuple[Message, bytes]:
    """The headers and the body of a response."""
    url = f"https://{fleet.envoy.address}{path}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    asked = urllib.request.Request(url, body, named, method=method)
    context = ssl.create_default_context(cafile=str(fleet.certificates.ca))
    handlers = urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({})
    with urllib.request.build_opener(*handlers).open(asked, timeout=BOUND_S) as response:
        return response.headers, response.read()


def frames(body: bytes) -> Iterator[tuple[int, bytes]]:
    while body:
        kind, size = struct.unpack_from(">BI", body)
        yield kind, body[5 : 5 + size]
        body = body[5 + size :]


GENERATE = "/steer.v1.GenerationService/Generate"


def test_a_call_over_grpc_web_gets_its_messages_and_its_status(fleet: Fleet) -> None:
    message = text_request("one two", max_tokens=5).SerializeToString()
    kind = "application/grpc-web+proto"
    _, body = call(fleet, GENERATE, struct.pack(">BI", 0, len(message)) + message, content_type=kind, x_grpc_web="1")

    *messages, (last, status) = frames(body)
    responses = [GenerateResponse.FromString(data) for _, data in messages]
    prompt = list(responses[0].started.prompt_token_ids)
    tokens = [token for one in responses if one.HasField("token") for token in one.token.token_ids]
    assert len(prompt) == 2
    assert tokens == [token_at(prompt, 0, number, 32_000) for number in range(5)]
    assert last == STATUS
    assert b"grpc-status:0" in status


def test_a_refusal_over_grpc_web_has_its_status_in_the_headers(fleet: Fleet) -> None:
    kind = "application/grpc-web+proto"
    headers, _ = call(fleet, GENERATE, struct.pack(">BI", 0, 0), content_type=kind, origin=ORIGIN)
    assert headers["grpc-status"] == "3"  # INVALID_ARGUMENT
    assert headers["access-control-allow-origin"] == ORIGIN
    exposed = headers["access-control-expose-headers"]
    assert all(name in exposed for name in ("grpc-status", "grpc-message", "grpc-status-details-bin"))


def test_pages_of_the_allowed_origin_may_call(fleet: Fleet) -> None:
    asked = {"origin": ORIGIN, "access_control_request_method": "POST"}
    headers, _ = call(fleet, GENERATE, None, "OPTIONS", **asked)
    assert headers["access-control-allow-origin"] == ORIGIN
    allowed = headers["access-control-allow-headers"]
    assert all(name in allowed for name in ("authorization", "content-type", "steer-client-id", "x-grpc-web"))


@pytest.mark.parametrize("origin", ["https://app.example.evil", "http://app.example", "null"])
def test_pages_of_other_origins_may_not(fleet: Fleet, origin: str) -> None:
    asked = {"origin": origin, "access_control_request_method": "POST"}
    try:
        headers, _ = call(fleet, GENERATE, None, "OPTIONS", **asked)
    except urllib.error.HTTPError as error:
        headers = error.headers
        error.close()
    assert "access-control-allow-origin" not in headers
