"""The HTTP port of operators: series of Prometheus and probes, over real connections."""

import asyncio
import logging
import re
import socket
import struct
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from steer_service.server import http_listener, pulse
from steer_service.server.engine_series import EngineSeries
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire.status_codes import error_from_rpc
from tests.server.capture_client import all_of
from tests.server.complete import Complete, certificate_in
from tests.server.scraped import documented, get, series
from tests.server.served import BOUND_S, Gate, Serve, bounded, text_request
from tests.server.test_tokens import entry
from tests.wire.request_messages import add, inline, steered


async def test_probes_say_whether_the_process_lives_and_whether_it_serves(serve: Serve, port: int) -> None:
    served = await serve(metrics_port=port, opened=False, lame_duck_s=BOUND_S)
    assert [await get(port, path) for path in ("/health", "/ready")] == [(200, "ok\n"), (503, "no\n")]
    await served.server.open(served.backend)
    assert await get(port, "/ready?verbose=1") == (200, "ok\n")

    draining = asyncio.ensure_future(served.server.drain())
    while await get(port, "/ready") != (503, "no\n"):
        await asyncio.sleep(0.01)
    assert await get(port, "/health") == (200, "ok\n")
    served.server.stop_now()
    await bounded(draining)
    assert (await get_or_none(port)) is None


async def get_or_none(port: int) -> Any:
    try:
        return await get(port, "/health")
    except OSError:
        return None


async def test_a_process_whose_event_loop_stands_still_is_not_healthy(
    serve: Serve, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "STALE_S", 0.2)
    monkeypatch.setattr(pulse, "CONFIRM_S", 0.01)
    await serve(metrics_port=port)
    reading = asyncio.get_running_loop().run_in_executor(None, until_unhealthy, port)
    time.sleep(1.0)  # noqa: ASYNC251  the event loop stands still
    assert await bounded(reading)
    while await get(port, "/health") != (200, "ok\n"):
        await asyncio.sleep(0.01)


def until_unhealthy(port: int) -> bool:
    end = time.monotonic() + 0.9
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=BOUND_S).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 503
        time.sleep(0.01)
    return False


async def test_other_paths_and_methods_are_none(serve: Serve, port: int) -> None:
    await serve(metrics_port=port)
    assert (await get(port, "/"))[0] == 404
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        await asyncio.to_thread(urllib.request.urlopen, request, timeout=BOUND_S)
    assert refused.value.code == 501
    refused.value.close()


async def test_requests_tokens_and_steered_rows_are_counted(serve: Serve, port: int) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), metrics_port=port, max_running_requests=1)
    asked = steered(add(inline(bytes(range(32)), (8,))), layer=1)
    asked.sampling.max_tokens = 4
    running = [
        asyncio.ensure_future(all_of(served.generation.Generate(request))) for request in (asked, text_request())
    ]
    while (await series(port))["steerllm_requests", ("waiting",)] < 1:
        await asyncio.sleep(0.01)
    assert (await series(port))["steerllm_requests", ("running",)] == 1
    gate.opened.set()
    await bounded(asyncio.gather(*running))

    found = await series(port)
    assert [found["steerllm_requests", (state,)] for state in ("running", "waiting")] == [0, 0]
    assert found["steerllm_time_to_first_token_seconds_count", ()] == 2
    [finished] = [one.finished for one in running[0].result() if one.HasField("finished")]
    assert found["steerllm_steered_rows_total", ()] == finished.receipt.rows_steered > 0


async def test_refusals_are_counted_by_reason(serve: Serve, port: int, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    await asyncio.to_thread(tokens.write_text, entry("alice", "alices"))
    served = await serve(metrics_port=port, token_file=str(tokens))
    alice = (("authorization", "Bearer alices"),)
    before, refused = await series(port), []
    for request, metadata in ((text_request(request_id="a b"), alice), (text_request(), ())):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bounded(all_of(served.generation.Generate(request, metadata=metadata)))
        refused.append((caught.value.code().name, error_from_rpc(caught.value).reason))
    after = await series(port)
    assert [code for code, _ in refused] == ["INVALID_ARGUMENT", "UNAUTHENTICATED"]
    for labels in refused:
        assert after["steerllm_errors_total", labels] == before.get(("steerllm_errors_total", labels), 0) + 1


async def test_every_series_of_the_documentation_exists_and_has_a_description(
    serve: Serve, port: int, tmp_path: Path
) -> None:
    await serve(Complete(), metrics_port=port, **certificate_in(tmp_path))
    _, text = await get(port, "/metrics")
    names = {one.name for family in text_string_to_metric_families(text) for one in family.samples}
    ours = {re.sub("_(bucket|count|sum)$", "", name) for name in names if name.startswith("steerllm_")}
    ours = {name for name in ours if not name.endswith("_created")}
    assert ours == documented()
    assert "process_resident_memory_bytes" in names
    _, text = await get(port, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


def test_vllms_series_have_their_names_and_the_requests_in_our_queue() -> None:
    vllms = CollectorRegistry()
    waiting = Gauge("vllm:num_requests_waiting", "Waiting.", ["engine"], registry=vllms)
    for engine in (0, 1):
        waiting.labels(str(engine)).set(3 + engine)
    Gauge("vllm:kv_cache_usage_perc", "Usage.", ["engine"], registry=vllms).labels("0").set(0.5)
    Counter("other", "Of another library.", registry=vllms)
    shown = CollectorRegistry()
    shown.register(EngineSeries(lambda: 7, vllms))

    found = {(one.name, one.labels.get("engine")): one.value for family in shown.collect() for one in family.samples}
    assert found == {
        ("vllm:num_requests_waiting", "0"): 10.0,
        ("vllm:num_requests_waiting", "1"): 4.0,
        ("vllm:kv_cache_usage_perc", "0"): 0.5,
    }


async def test_connections_that_send_nothing_take_neither_all_threads_nor_for_ever(
    serve: Serve, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_listener, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(http_listener, "TIMEOUT_S", 0.2)
    await serve(metrics_port=port)
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    ended = [await bounded(reader.read()) for reader, _ in silent]  # the third at once, the others in time
    assert ended == [b""] * 3
    for _, writer in silent:
        writer.close()
    monkeypatch.undo()  # a request on a busy machine may take that long
    assert await get(port, "/health") == (200, "ok\n")


async def test_a_client_that_breaks_off_leaves_no_lines(
    serve: Serve, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    await serve(metrics_port=port)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets
        client.sendall(b"GET /metrics HTTP/1.0\r\n")
    assert await get(port, "/health") == (200, "ok\n")
    assert capfd.readouterr().err == ""


def test_metadata_that_is_not_text_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("grpc._cython.cygrpc")
    logger.error("Invalid encoding on b'Bearer s3cr3t' %s", "UnicodeDecodeError")
    logger.error("another line")
    assert [record.getMessage() for record in caplog.records] == ["another line"]
