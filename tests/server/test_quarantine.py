"""A request that kills the engine each time is found among those that were in flight with it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.server.quarantine import MAX_REMEMBERED, Quarantine
from steer_service.wire.status_codes import error_from_rpc
from tests.server.served import bounded, text_request
from tests.server.test_supervisor import Mortal, Starts, Supervised, supervised

INNOCENT = [f"innocent {number}" for number in range(6)]
POISON = "poison"


class Fragile(Mortal):
    """Dies of the poison once all requests of a batch are there; notes which requests ran together."""

    def __init__(self, together: Sequence[str]) -> None:
        super().__init__(step=self._run)
        self._together = together
        self.largest_batch = 0
        self._all_there = asyncio.Event()

    async def _run(self, number: int) -> None:
        if self.running == 1 and self.requests[-1].request_id == "warm-up":
            return
        self.largest_batch = max(self.largest_batch, self.running)
        if self.running == len(self._together):
            self._all_there.set()
        await self._all_there.wait()
        prompts = [getattr(request.prompt, "text", "") for request in self.requests[-self.running :]]
        self.lives = self.lives and POISON not in prompts
        if not self.lives:
            raise EngineFailed("the engine died", reason="ENGINE_DIED")


async def outcomes(one: Supervised, texts: Sequence[str]) -> dict[str, str]:
    """How each of these requests, sent at once, ends: "OK" or the error's reason."""

    async def outcome(text: str) -> str:
        try:
            async for _ in one.served.generation.Generate(text_request(text)):
                pass
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error).reason
        return "OK"

    return dict(zip(texts, await bounded(asyncio.gather(*map(outcome, texts))), strict=True))


async def test_the_poison_is_refused_and_all_others_are_served() -> None:
    texts = [*INNOCENT[:3], POISON, *INNOCENT[3:]]
    starts = Starts()
    starts.others = {number: Fragile(texts if number < 2 else [POISON]) for number in range(5)}
    ended: dict[str, str] = {}
    async with supervised(starts) as one:
        for _ in range(2):
            await one.next_serving()
            assert set((await outcomes(one, texts)).values()) == {"ENGINE_DIED"}
        for _ in range(3):
            backend = await one.next_serving()
            left = [text for text in texts if ended.get(text) not in ("OK", "QUARANTINED")]
            ended |= await outcomes(one, left)
            assert backend.largest_batch == 1  # type: ignore[attr-defined]
            if backend.lives:
                break
        assert ended == {**dict.fromkeys(INNOCENT, "OK"), POISON: "QUARANTINED"}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await one.served.generate(text_request(POISON))
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert starts.begun == 4


def ask(text: str, **changes: Any) -> GenerateRequest:
    return GenerateRequest(prompt=TextPrompt(text=text), **changes)


async def is_refused(quarantine: Quarantine, request: GenerateRequest) -> bool:
    try:
        async with quarantine.turn(request):
            return False
    except Unsupported as error:
        return error.reason == "QUARANTINED"


async def test_a_request_is_recognised_by_its_client_and_content_whatever_its_id() -> None:
    quarantine = Quarantine()
    for number in range(3):
        quarantine.note_death([ask("x", client_id="alice", request_id=f"{number}")])
    assert await is_refused(quarantine, ask("x", client_id="alice"))
    assert await is_refused(quarantine, ask("x", client_id="alice", request_id="new"))
    assert not await is_refused(quarantine, ask("x", client_id="bob"))
    assert not await is_refused(quarantine, ask("y", client_id="alice"))
    assert not await is_refused(quarantine, ask("x", client_id="alice", truncate_prompt_tokens=5)), "another prompt"


async def test_a_request_that_completes_is_cleared() -> None:
    quarantine = Quarantine()
    for _ in range(5):
        quarantine.note_death([ask("x")])
        assert not await is_refused(quarantine, ask("x"))


async def test_a_request_that_is_cancelled_is_not_cleared() -> None:
    quarantine = Quarantine()
    for _ in range(3):
        quarantine.note_death([ask("x")])
        try:
            async with quarantine.turn(ask("x")):
                raise asyncio.CancelledError
        except (asyncio.CancelledError, Unsupported):
            pass
    assert await is_refused(quarantine, ask("x"))


async def test_equal_requests_at_one_death_count_once() -> None:
    quarantine = Quarantine()
    quarantine.note_death([ask("x")] * 5)
    assert not await is_refused(quarantine, ask("x"))


async def test_the_oldest_requests_are_forgotten() -> None:
    quarantine = Quarantine()
    for _ in range(3):
        quarantine.note_death([ask("old")])
    quarantine.note_death([ask(f"{number}") for number in range(MAX_REMEMBERED)])
    assert not await is_refused(quarantine, ask("old"))
