"""Calls with many prompts: how many are in flight, what is refused and sent again, progress and partial results."""

import asyncio
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from steer_client import (
    AnswerScore,
    AsyncSteerClient,
    CaptureDelivery,
    CaptureSpec,
    DeadlineExceeded,
    Generation,
    InvalidRequest,
    Overloaded,
    SamplingOptions,
    SteerClient,
    SteerError,
    fetch_all,
)
from steer_service.testing.fake_backend import FakeBackend
from tests.client.conftest import Gate, Serve

HELD = CaptureSpec(layers=(1,), delivery=CaptureDelivery.HELD)
BAD = " "
"""A prompt that the fake model refuses: it has no word."""


class Peak:
    """A step of the backend that lets other requests run, and the most that ran at once."""

    def __init__(self) -> None:
        self.backend: FakeBackend | None = None
        self.most = 0

    async def __call__(self, number: int) -> None:
        assert self.backend is not None
        self.most = max(self.most, self.backend.running)
        await asyncio.sleep(0)


def peaked() -> tuple[FakeBackend, Peak]:
    peak = Peak()
    peak.backend = FakeBackend(step=peak)
    return peak.backend, peak


async def test_more_prompts_than_the_server_has_places_all_succeed(serve: Serve) -> None:
    backend, _ = peaked()
    server = serve(backend, max_concurrent_requests=8, retry_after_s=0.01)
    prompts = [f"prompt {number}" for number in range(100)]
    async with AsyncSteerClient(server.address) as client:
        texts, _ = await client.generate(prompts, max_tokens=3)
        alone = [(await client.generate(prompt, max_tokens=3))[0][0] for prompt in prompts[:3]]

    assert len(texts) == 100
    assert texts[:3] == alone
    assert backend.finished >= 100


async def test_at_most_so_many_are_in_flight(serve: Serve) -> None:
    backend, peak = peaked()
    server = serve(backend)
    async with AsyncSteerClient(server.address, max_concurrency=3) as client:
        await client.generate(["a"] * 12, max_tokens=3)
        of_the_client, peak.most = peak.most, 0
        await client.chat([[{"role": "user", "content": "a"}]] * 12, max_tokens=3, max_concurrency=2)
        of_the_call, peak.most = peak.most, 0
        await client.score("a b", [" c"] * 12, max_concurrency=1)

    assert of_the_client <= 3
    assert of_the_call <= 2
    assert peak.most <= 1


async def test_without_time_for_retries_a_refusal_is_raised(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)), max_concurrent_requests=2)
    async with AsyncSteerClient(server.address) as client:
        with pytest.raises(Overloaded) as raised:
            await client.generate(["a"] * 4, max_tokens=3, retry_timeout_s=0)

    assert raised.value.prompt_index is not None
    server.wait_idle()


async def test_retries_end_after_their_time(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)), max_concurrent_requests=1, retry_after_s=0.01)
    async with AsyncSteerClient(server.address) as client, AsyncSteerClient(server.address) as other:
        blocking = asyncio.create_task(other.generate("a", max_tokens=3))
        await asyncio.to_thread(server.wait_running, 1)
        with pytest.raises(Overloaded) as raised:
            await client.generate(["a", "b"], max_tokens=3, retry_timeout_s=0.1)
        blocking.cancel()
        await asyncio.wait([blocking])

    assert any("retry_timeout_s" in note for note in raised.value.__notes__)


async def test_waiting_for_a_place_counts_against_the_timeout(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)), max_concurrent_requests=1, retry_after_s=0.01)
    async with AsyncSteerClient(server.address, timeout_s=0.3) as client, AsyncSteerClient(server.address) as other:
        blocking = asyncio.create_task(other.generate("a", max_tokens=3))
        await asyncio.to_thread(server.wait_running, 1)
        for options, option in (
            ({"timeout_s": 0.2}, "0.2 s, the timeout_s of the call"),
            ({}, "0.3 s, the timeout_s of"),
        ):
            with pytest.raises(DeadlineExceeded, match=f"generate took longer than {option}"):
                await client.generate(["a", "b"], max_tokens=3, **options)
        blocking.cancel()
        await asyncio.wait([blocking])


async def test_partial_results_keep_the_order_and_the_captures(serve: Serve) -> None:
    server = serve(FakeBackend())
    async with AsyncSteerClient(server.address) as client:
        generations, handles = await client.generate(
            ["one", BAD, "two three"], max_tokens=2, n=2, capture=HELD, raw_output=True, return_exceptions=True
        )
        assert [type(one) for one in generations] == [Generation, InvalidRequest, Generation]
        failed = generations[1]
        assert isinstance(failed, SteerError)
        assert failed.prompt_index == 1
        assert handles is not None
        assert [handle is None for handle in handles] == [False, False, True, True, False, False]
        with pytest.raises(InvalidRequest, match=r"handles\[2\].*its prompt failed; leave it out"):
            await fetch_all(handles)
        rows = [(await handle.fetch_rows()).hidden[1].shape[0] for handle in handles if handle is not None]
        assert rows == [2, 2, 3, 3]
        for handle in handles:
            if handle is not None:
                await handle.close()
    server.wait_holding(0)


async def test_the_first_error_names_its_prompt_and_leaves_nothing(serve: Serve) -> None:
    server = serve(FakeBackend())
    async with AsyncSteerClient(server.address) as client:
        with pytest.raises(InvalidRequest) as raised:
            await client.generate(["one", "two", BAD], max_tokens=2, capture=HELD, max_concurrency=1)

    assert raised.value.prompt_index == 2
    assert raised.value.__notes__[0].startswith("prompts[2] failed first, after 2 of 3 had succeeded")
    server.wait_holding(0)


async def test_after_its_timeout_a_call_may_return_what_it_has(serve: Serve) -> None:
    backend = FakeBackend(step=Gate(2))  # a request of one token does not reach it
    server = serve(backend)
    seen: list[tuple[int, int]] = []
    async with AsyncSteerClient(server.address) as client:
        sampling = [SamplingOptions(max_tokens=1), SamplingOptions(max_tokens=5)]
        [first, second], _ = await client.generate(
            ["a", "b"],
            sampling,
            raw_output=True,
            return_exceptions=True,
            timeout_s=0.5,
            progress=lambda done, total: seen.append((done, total)),
        )

    assert isinstance(first, Generation)
    assert isinstance(second, DeadlineExceeded)
    assert second.prompt_index == 1
    assert seen == [(1, 2), (2, 2)]
    server.wait_idle()


async def test_scores_may_be_partial_too(serve: Serve) -> None:
    async with AsyncSteerClient(serve().address) as client:
        scores = await client.score(["a b", BAD, "c"], [" x", " y", " z"], return_exceptions=True)

    assert [type(score) for score in scores] == [AnswerScore, InvalidRequest, AnswerScore]


async def test_errors_of_scores_have_the_number_of_their_answer(serve: Serve) -> None:
    async with AsyncSteerClient(serve().address) as client:
        scores = await client.score([BAD, "a", BAD], [" x", " y", " z"], return_exceptions=True)
        with pytest.raises(InvalidRequest) as raised:
            await client.score(["a", "a", BAD], [" x", " y", " z"])

    assert [getattr(score, "prompt_index", None) for score in scores] == [0, None, 2]
    assert raised.value.prompt_index == 2


async def test_texts_have_no_place_for_an_error(serve: Serve) -> None:
    async with AsyncSteerClient(serve().address) as client:
        ask: Callable[..., Any] = client.generate
        with pytest.raises(InvalidRequest, match="return_exceptions: it needs raw_output=True"):
            await ask(["a"], return_exceptions=True)


@pytest.mark.parametrize(
    ("option", "value"), [("max_concurrency", 0), ("max_concurrency", "2"), ("progress", 3), ("retry_timeout_s", -1)]
)
async def test_an_option_that_is_wrong_is_refused_before_anything_is_sent(
    serve: Serve, option: str, value: Any
) -> None:
    server = serve()
    async with AsyncSteerClient(server.address) as client:
        ask: Callable[..., Any] = client.generate
        with pytest.raises(InvalidRequest) as raised:
            await ask(["a"], **{option: value})

    assert raised.value.field == option
    assert server.backend.requests == []


def test_progress_is_a_bar_or_a_function(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    with SteerClient(serve().address) as client:
        client.generate(["a", "b", "c"], max_tokens=1, progress=lambda done, total: seen.append((done, total)))
        client.generate(["a", "b"], max_tokens=1, progress=True)

    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "2/2" in capsys.readouterr().err


def test_a_progress_function_may_end_the_program(serve: Serve) -> None:
    server = serve()

    def leave(done: int, total: int) -> None:
        raise SystemExit(f"{done} of {total} are enough")

    with SteerClient(server.address) as client:
        with pytest.raises(SystemExit, match="1 of 3 are enough"):
            client.generate(["a", "b", "c"], max_tokens=1, max_concurrency=1, progress=leave)
        server.wait_idle()

    assert len(server.backend.requests) == 1


def test_the_blocking_client_returns_partial_results(serve: Serve) -> None:
    server = serve()
    with SteerClient(server.address) as client:
        generations, handles = client.generate(
            ["a", BAD], max_tokens=2, capture=HELD, raw_output=True, return_exceptions=True
        )
        assert [type(one) for one in generations] == [Generation, InvalidRequest]
        assert handles is not None
        [first, second] = handles
        assert second is None
        assert first is not None
        with first:
            assert first.fetch()[1][0]["hidden"].shape[0] == 2
    server.wait_holding(0)


def test_an_interrupt_ends_all_requests_on_the_server(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)))

    def interrupt() -> None:
        server.wait_running(4)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with SteerClient(server.address) as client:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            client.generate(["a"] * 20, max_tokens=3, max_concurrency=4)
        server.wait_idle()

    assert len(server.backend.requests) == 4


async def test_backends_in_this_process_take_the_same_options() -> None:
    backend, peak = peaked()
    generations, _ = await backend.generate(
        ["a", BAD, "b"], max_tokens=2, max_concurrency=1, raw_output=True, return_exceptions=True
    )

    assert [type(one) for one in generations] == [Generation, InvalidRequest, Generation]
    assert peak.most == 1
