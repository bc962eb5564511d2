"""The log line of a call: how it ended, in every way in which a call can end, and what it did."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from steer_service.core.errors import EngineFailed
from steer_service.core.log_lines import JsonLines
from steer_service.server.call_log import REFUSALS_PER_S, RefusalLimit
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import generation_pb2, info_pb2, tokenizer_pb2
from tests.server.capture_client import Begin, all_of, asking
from tests.server.served import Gate, Serve, bounded, text_request
from tests.server.test_tokens import entry

LOG = "steer_service.server.call_log"
GENERATE = "steer.v1.GenerationService/Generate"
SECRET = (("steer-client-id", "a-secret-of-alice"),)


class Lines:
    """The lines of calls that have ended."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self._arrived = asyncio.Event()

    def add(self, line: dict[str, Any]) -> None:
        self.seen.append(line)
        self._arrived.set()

    async def of(self, method: str = GENERATE) -> dict[str, Any]:
        """The next line of a method."""

        async def wait() -> dict[str, Any]:
            while not (found := [line for line in self.seen if line["method"] == method]):
                self._arrived.clear()
                await self._arrived.wait()
            self.seen.remove(found[0])
            return found[0]

        return await bounded(wait())


@pytest.fixture
async def lines(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("steer_service.server.call_log._limit", RefusalLimit())
    found, form = Lines(), JsonLines()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.add(json.loads(form.format(record)))

    logger, handler = logging.getLogger(LOG), Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


async def test_a_complete_request_says_what_it_did(begin: Begin, lines: Lines) -> None:
    alice = await begin(FakeBackend())
    request = asking(layers=[0])
    request.request_id = "mine"
    metadata = (*alice.metadata, ("x-request-id", "edge-1"))
    await bounded(all_of(alice.served.generation.Generate(request, metadata=metadata)))

    line = await lines.of()
    assert (line["event"], line["level"], line["code"]) == ("call", "info", "OK")
    assert (line["request_id"], line["x_request_id"], line["model"]) == ("mine", "edge-1", "fake")
    assert (line["prompt_tokens"], line["generated_tokens"], line["steered_rows"]) == (3, 4, 0)
    assert line["captured_bytes"] == 6 * 8 * 4
    assert 0 <= line["queue_wait_s"] <= line["first_token_s"] <= line["duration_s"]
    assert "reason" not in line


async def test_a_claimed_client_is_a_hash_and_a_proven_one_a_name(serve: Serve, lines: Lines, tmp_path: Path) -> None:
    served = await serve()
    for metadata in (SECRET, SECRET, ()):
        await bounded(all_of(served.generation.Generate(text_request(), metadata=metadata)))
    first, second, nameless = [(await lines.of())["client"] for _ in range(3)]
    assert first == second != nameless
    assert {name[0] for name in (first, nameless)} == {"~"}
    assert "secret" not in first

    (tmp_path / "tokens.toml").write_text(entry("alice", "alices"))
    served = await serve(token_file=str(tmp_path / "tokens.toml"))
    await bounded(all_of(served.generation.Generate(text_request(), metadata=(("authorization", "Bearer alices"),))))
    assert (await lines.of())["client"] == "alice"


async def ended(call: Any) -> None:
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await bounded(all_of(call))


async def test_a_refusal_has_its_reason(serve: Serve, lines: Lines) -> None:
    served = await serve(opened=False)
    await ended(served.generation.Generate(text_request()))
    assert ((line := await lines.of())["code"], line["reason"]) == ("UNAVAILABLE", "LOADING")
    await served.server.open(FakeBackend())
    await ended(served.generation.Generate(text_request(text="")))
    assert ((line := await lines.of())["code"], line["reason"]) == ("INVALID_ARGUMENT", "EMPTY_PROMPT")
    await ended(served.generation.Generate(text_request(model="secret-model")))
    assert ((line := await lines.of())["code"], line["reason"]) == ("NOT_FOUND", "UNKNOWN_MODEL")
    assert "secret-model" not in json.dumps(line)


async def test_a_call_without_a_valid_token_is_a_line_too(serve: Serve, lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "tokens.toml").write_text(entry("alice", "alices"))
    served = await serve(token_file=str(tmp_path / "tokens.toml"))
    await ended(served.generation.Generate(text_request(), metadata=(("authorization", "Bearer wrong"),)))
    assert ((line := await lines.of())["code"], line["reason"]) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    assert "wrong" not in json.dumps(line)


async def test_a_failure_in_the_middle_has_what_was_done_until_then(serve: Serve, lines: Lines) -> None:
    served = await serve()
    served.backend.failure, served.backend.fail_at = EngineFailed("the text of a prompt", reason="ABORTED"), 2
    await ended(served.generation.Generate(text_request()))
    line = await lines.of()
    assert (line["code"], line["reason"], line["generated_tokens"]) == ("INTERNAL", "ABORTED", 2)
    assert "prompt" not in line["message"]


@pytest.mark.parametrize("reads", [False, True], ids=["while the engine works", "in the middle"])
async def test_a_client_that_goes_is_named_so(serve: Serve, lines: Lines, reads: bool) -> None:
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    call = served.generation.Generate(text_request())
    if reads:
        await bounded(call.read())
    await bounded(gate.reached.wait())
    call.cancel()
    assert ((line := await lines.of())["code"], line["reason"]) == ("CANCELLED", "CLIENT_GONE")


async def test_a_deadline_of_the_client_is_named_so(serve: Serve, lines: Lines) -> None:
    served = await serve()
    served.backend.step = Gate(at=0)
    await ended(served.generation.Generate(text_request(), timeout=0.3))
    assert ((line := await lines.of())["code"], line["reason"]) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")


async def test_a_request_that_is_cancelled_by_its_token_is_named_so(serve: Serve, lines: Lines) -> None:
    served = await serve()
    served.backend.step = Gate()
    call = served.generation.Generate(text_request())
    started = (await bounded(call.read())).started
    await served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=started.cancel_token))
    assert ((line := await lines.of())["code"], line["reason"]) == ("CANCELLED", "CANCELLED")


async def test_a_stop_of_the_server_is_named_so(serve: Serve, lines: Lines) -> None:
    served = await serve()
    served.backend.step = Gate()
    call = served.generation.Generate(text_request())
    await bounded(call.read())
    served.server.stop_now()
    await bounded(served.server.drain())
    assert ((line := await lines.of())["code"], line["reason"]) == ("UNAVAILABLE", "DRAINING")


async def test_health_and_facts_are_for_the_level_debug(serve: Serve, lines: Lines) -> None:
    served = await serve()
    await served.health.Check(health_pb2.HealthCheckRequest())
    await served.info.GetModel(info_pb2.GetModelRequest())
    await served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text="a"))
    assert (await lines.of("grpc.health.v1.Health/Check"))["level"] == "debug"
    assert (await lines.of("steer.v1.InfoService/GetModel"))["level"] == "debug"
    assert (await lines.of("steer.v1.TokenizerService/Tokenize"))["level"] == "info"


async def test_many_refusals_are_few_lines_which_count_the_others(
    serve: Serve, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("steer_service.server.call_log.RefusalLimit.now", staticmethod(lambda: now))
    served = await serve()
    for _ in range(REFUSALS_PER_S + 5):
        await served.failure(text_request(text=""))
    assert len([line for line in lines.seen if line["method"] == GENERATE]) == REFUSALS_PER_S
    lines.seen.clear()

    await served.generate(text_request())  # one that does work is always logged
    assert (await lines.of())["code"] == "OK"

    now += 1.0
    await served.failure(text_request(text=""))
    assert (await lines.of())["refusals_not_logged"] == 5
