"""The table of running requests."""

from typing import Any

from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.server.admission import Admission
from steer_service.server.call_end import CallEnd
from steer_service.server.callers import Caller
from steer_service.server.config import ServerConfig

COUNT = 100


async def test_cancel_tokens_cannot_be_guessed() -> None:
    admission, request = Admission(ServerConfig()), GenerateRequest(prompt=TextPrompt(text="a"))
    context: Any = None  # nothing is sent
    tokens = set()
    for _ in range(COUNT):
        caller = Caller(owner="", share="", connection="")
        with admission.admit(request, caller, CallEnd(context)) as active:
            tokens.add(active.cancel_token)
    assert len(tokens) == COUNT
    assert min(map(len, tokens)) >= 21  # characters of base64: 128 bits are 22, without the last
