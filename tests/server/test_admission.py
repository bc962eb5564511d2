"""The table of running requests, and what is left when one has ended."""

import asyncio
from typing import Any

from steer_service.core.errors import EngineFailed
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.server.admission import Admission
from steer_service.server.call_end import CallEnd
from steer_service.server.callers import Caller
from steer_service.server.config import ServerConfig
from steer_service.server.fair_queue import Load
from steer_service.testing.fake_backend import FakeBackend
from tests.server.served import bounded

NOBODY = Caller(owner="", share="", connection="")
CONTEXT: Any = None
"""Nothing is sent in these tests."""


async def test_cancel_tokens_cannot_be_guessed() -> None:
    admission, request = Admission(ServerConfig()), GenerateRequest(prompt=TextPrompt(text="a"))
    tokens = set()
    for _ in range(100):
        with admission.admit(request, NOBODY, CallEnd(CONTEXT)) as active:
            tokens.add(active.cancel_token)
    assert len(tokens) == 100
    assert min(len(token.partition(b"/")[2]) for token in tokens) >= 16


async def test_a_call_that_has_ended_is_not_ended_again() -> None:
    """It would also keep its memory until then: an hour, or until the server stops."""
    admission = Admission(ServerConfig(max_deadline_s=0.01))
    admission.open(FakeBackend())
    end, later = CallEnd(CONTEXT), asyncio.Event()
    async with admission.place(NOBODY, Load(), end):
        asyncio.get_running_loop().call_later(0.02, later.set)

    await bounded(later.wait())
    admission.stop_all(EngineFailed("the server stopped", reason="DRAINING"))

    assert end.error is None
