"""The series of requests, as Prometheus reads them: how they ended, how long they waited, and between tokens."""

import asyncio
import time

import grpc
import pytest

from steer_service.core.errors import EngineFailed, SteerError
from steer_service.server.error_counts import TO_ALERT_ON
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import generation_pb2
from tests.server.capture_client import all_of, rest_of
from tests.server.scraped import Series, series
from tests.server.served import Gate, Serve, bounded, text_request
from tests.test_errors_page import PAGE_ENTRIES


def finished(found: Series) -> dict[str, float]:
    """Code -> requests, of the codes with any."""
    return {
        labels[0]: value
        for (name, labels), value in found.items()
        if name == "steerllm_requests_finished_total" and value
    }


async def test_requests_are_counted_by_the_code_with_which_they_end(serve: Serve, port: int) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(), metrics_port=port)
    assert finished(await series(port)) == {}
    await served.generate(text_request())
    await served.generate(text_request())
    await served.failure(text_request(request_id="a b"))
    await served.failure(text_request(request_id="c d"))
    assert finished(await series(port)) == {"OK": 2, "INVALID_ARGUMENT": 2}

    served.backend.step = gate
    call = served.generation.Generate(text_request())
    await bounded(gate.reached.wait())
    call.cancel()
    await bounded(served.backend.wait_idle())
    while "CANCELLED" not in finished(await series(port)):
        await asyncio.sleep(0.01)
    assert finished(await series(port)) == {"OK": 2, "INVALID_ARGUMENT": 2, "CANCELLED": 1}


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineFailed("broken"), "INTERNAL"),
        (EngineFailed("died", reason="ENGINE_DIED"), "UNAVAILABLE"),
        (RuntimeError("a slip in the server"), "INTERNAL"),
    ],
)
async def test_requests_that_fail_are_counted_once(serve: Serve, port: int, failure: SteerError, code: str) -> None:
    served = await serve(FakeBackend(fail_at=1), metrics_port=port)
    served.backend.failure = failure
    assert (await served.failure(text_request())).code().name == code
    assert finished(await series(port)) == {code: 1}


async def test_what_another_task_ends_is_counted_with_its_code(serve: Serve, port: int) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), metrics_port=port)
    call = served.generation.Generate(text_request())
    first = await bounded(call.read())
    request = generation_pb2.CancelRequest(cancel_token=first.started.cancel_token)
    assert (await bounded(served.generation.Cancel(request))).cancelled
    with pytest.raises(grpc.aio.AioRpcError):
        await bounded(rest_of(call))
    assert finished(await series(port)) == {"CANCELLED": 1}

    limited = await serve(FakeBackend(step=Gate(at=2)), metrics_port=0, max_deadline_s=0.05)
    assert (await limited.failure(text_request())).code().name == "DEADLINE_EXCEEDED"
    value = limited.server.metrics.registry.get_sample_value
    assert value("steerllm_requests_finished_total", {"code": "DEADLINE_EXCEEDED"}) == 1
    assert value("steerllm_requests_finished_total", {"code": "CANCELLED"}) == 0


async def test_a_request_without_a_place_is_counted_as_refused(serve: Serve, port: int) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), metrics_port=port, max_concurrent_requests=1)
    running = asyncio.ensure_future(all_of(served.generation.Generate(text_request())))
    await bounded(gate.reached.wait())
    assert (await served.failure(text_request())).code().name == "RESOURCE_EXHAUSTED"
    gate.opened.set()
    await bounded(running)
    assert finished(await series(port)) == {"OK": 1, "RESOURCE_EXHAUSTED": 1}


async def test_the_wait_for_a_place_is_measured_for_each_request_that_got_one(serve: Serve, port: int) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), metrics_port=port, max_running_requests=1)
    first = asyncio.ensure_future(all_of(served.generation.Generate(text_request())))
    await bounded(gate.reached.wait())
    second = asyncio.ensure_future(all_of(served.generation.Generate(text_request())))
    while not (await series(port))["steerllm_requests", ("waiting",)]:
        await asyncio.sleep(0.01)
    waits_since = time.monotonic()
    assert (await series(port))["steerllm_queue_wait_seconds_count", ()] == 1
    least_s = time.monotonic() - waits_since
    gate.opened.set()
    await bounded(asyncio.gather(first, second))
    found = await series(port)
    assert found["steerllm_queue_wait_seconds_count", ()] == 2
    assert found["steerllm_queue_wait_seconds_sum", ()] > least_s


async def test_the_time_between_tokens_is_measured_for_each_output(serve: Serve, port: int) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), metrics_port=port)
    request = text_request(max_tokens=5)
    request.sampling.n = 3
    running = asyncio.ensure_future(all_of(served.generation.Generate(request)))
    await bounded(gate.reached.wait())
    held_since = time.monotonic()
    while (await series(port))["steerllm_inter_token_latency_seconds_count", ()] < 3:  # the second of each output
        await asyncio.sleep(0.01)
    least_s = time.monotonic() - held_since
    gate.opened.set()
    await bounded(running)

    found = await series(port)
    assert found["steerllm_inter_token_latency_seconds_count", ()] == 3 * 4
    assert found["steerllm_inter_token_latency_seconds_bucket", ("+Inf",)] == 3 * 4
    assert found["steerllm_inter_token_latency_seconds_sum", ()] > 3 * least_s
    assert found["steerllm_time_to_first_token_seconds_count", ()] == 1


async def test_a_time_between_tokens_is_in_its_bucket_and_all_above(serve: Serve, port: int) -> None:
    served = await serve(metrics_port=port)
    for seconds in (0.01, 0.011, 100.0):
        served.server.metrics.token_latency.observe(seconds)
    found = await series(port)
    at_most = {
        labels[0]: value
        for (name, labels), value in found.items()
        if name == "steerllm_inter_token_latency_seconds_bucket"
    }
    assert [at_most[bound] for bound in ("0.005", "0.01", "0.015", "10.0", "+Inf")] == [0, 1, 2, 2, 3]
    assert found["steerllm_inter_token_latency_seconds_sum", ()] == pytest.approx(100.021)


def test_errors_that_are_shown_from_the_start_are_in_the_list_of_errors() -> None:
    shown = {(code, reason) for code, reasons in TO_ALERT_ON.items() for reason in reasons}
    assert shown <= {(entry.heading, reason) for reason, entry in PAGE_ENTRIES.items()}


async def test_errors_to_alert_on_are_shown_before_the_first(serve: Serve, port: int) -> None:
    await serve(metrics_port=port)
    found = await series(port)
    for code, reasons in TO_ALERT_ON.items():
        for reason in reasons:
            assert ("steerllm_errors_total", (code, reason)) in found
