"""The series of the server's state, as Prometheus reads them."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from steer_service.server import pulse
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.server.capture_client import ROW_BYTES, ROWS, Begin, asking, required, until
from tests.server.complete import USAGE, Complete, certificate_in
from tests.server.scraped import get, series
from tests.server.served import Gate, Serve, bounded
from tests.server.test_stored_vectors import ONE, steered, upload

BYTES = 3 * ROWS * ROW_BYTES
"""Of one capture here."""


async def test_the_engine_is_up_while_requests_are_served(serve: Serve, port: int) -> None:
    served = await serve(metrics_port=port, opened=False, lame_duck_s=60.0)
    assert (await series(port))["steerllm_engine_up", ()] == 0
    await served.server.open(served.backend)
    assert (await series(port))["steerllm_engine_up", ()] == 1
    draining = asyncio.ensure_future(served.server.drain())
    while (await series(port))["steerllm_engine_up", ()] == 1:
        await asyncio.sleep(0.01)
    served.server.stop_now()
    await bounded(draining)


async def test_the_bank_and_shared_memory_are_what_the_open_backend_says(serve: Serve, port: int) -> None:
    served = await serve(metrics_port=port, opened=False)
    loading = {name for name, _ in await series(port)}
    assert not {name for name in loading if name.startswith(("steerllm_bank", "steerllm_shared_memory_used"))}

    await served.server.open(Complete())
    found = await series(port)
    bank = USAGE.bank
    assert [found["steerllm_bank_slots", (state,)] for state in ("used", "idle", "free")] == [5, 20, 103]
    assert [found["steerllm_bank_operations", (state,)] for state in ("used", "idle", "free")] == [300, 700, 3000]
    assert found["steerllm_bank_waiting_requests", ()] == bank.waiting_requests
    for budget, memory in USAGE.memory.items():
        assert found["steerllm_shared_memory_used_bytes", (budget,)] == memory.used_bytes
        assert found["steerllm_shared_memory_limit_bytes", (budget,)] == memory.limit_bytes
    assert found["steerllm_shared_memory_segments", ()] == USAGE.segments
    assert found["steerllm_shared_memory_filesystem_free_bytes", ()] > 0


async def test_captures_in_the_store_are_counted_by_kind(begin: Begin, arena: Arena, port: int) -> None:
    alice = await begin(metrics_port=port)
    session, stream = await alice.session(arena.folder)
    held = await alice.held()
    await alice.held()
    await alice.generate(required(session))

    found = await series(port)
    assert [found["steerllm_stored_captures", (kind,)] for kind in ("held", "leased")] == [2, 1]
    assert [found["steerllm_stored_capture_bytes", (kind,)] for kind in ("held", "leased")] == [2 * BYTES, BYTES]
    assert found["steerllm_shared_memory_sessions", ()] == 1

    await alice.release(capture_id=held.capture_id)
    stream.cancel()
    await until(lambda: alice.served.backend.holding == 1)
    found = await series(port)
    assert [found["steerllm_stored_captures", (kind,)] for kind in ("held", "leased")] == [1, 0]
    assert found["steerllm_shared_memory_sessions", ()] == 0


async def test_stored_vectors_are_counted_with_hits_misses_and_evictions(serve: Serve, port: int) -> None:
    served = await serve(metrics_port=port, client_id="me", vector_store_bytes=2 * ONE, client_vector_bytes=2 * ONE)
    for number in range(3):  # the third takes the place of the first
        await upload(served, number)
    await served.generate(steered(1))
    await served.failure(steered(0))

    found = await series(port)
    assert found["steerllm_stored_vectors", ()] == 2
    assert found["steerllm_stored_vector_bytes", ()] == found["steerllm_stored_vector_limit_bytes", ()] == 2 * ONE
    assert [found["steerllm_stored_vector_lookups_total", (result,)] for result in ("hit", "miss")] == [1, 1]
    assert found["steerllm_stored_vector_evictions_total", ()] == 1


def expiry(path: str) -> float:
    return x509.load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()


async def test_certificates_tell_when_they_expire_also_after_they_were_replaced(
    serve: Serve, port: int, tmp_path: Path
) -> None:
    settings = certificate_in(tmp_path)
    await serve(metrics_port=port, **settings)
    found = await series(port)
    assert found["steerllm_certificate_expiry_timestamp_seconds", ("client_ca",)] == expiry(settings["tls_client_ca"])
    assert found["steerllm_certificate_expiry_timestamp_seconds", ("server",)] == expiry(settings["tls_cert"])

    tomorrow = datetime.now(UTC) + timedelta(days=1)
    certificate_in(tmp_path, not_after=tomorrow)
    while (await series(port))["steerllm_certificate_expiry_timestamp_seconds", ("server",)] != int(
        tomorrow.timestamp()
    ):
        await asyncio.sleep(0.01)


async def test_a_server_without_tls_has_no_certificate_that_expires(serve: Serve, port: int) -> None:
    await serve(metrics_port=port)
    assert "steerllm_certificate_expiry_timestamp_seconds" not in {name for name, _ in await series(port)}


async def test_the_age_of_the_event_loops_last_sign_grows_until_the_next(
    serve: Serve, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "CONFIRM_S", 1e6)
    await serve(metrics_port=port)
    first, second = [(await series(port))["steerllm_event_loop_pulse_age_seconds", ()] for _ in range(2)]
    assert 0 < first < second


async def test_without_the_directory_of_captures_other_series_are_read_all_the_same(
    serve: Serve, port: int, tmp_path: Path
) -> None:
    folder = tmp_path / "captures"
    folder.mkdir()
    await serve(metrics_port=port, shm_dir=str(folder))
    assert ("steerllm_shared_memory_filesystem_free_bytes", ()) in await series(port)
    folder.rename(tmp_path / "elsewhere")
    found = await series(port)
    assert ("steerllm_shared_memory_filesystem_free_bytes", ()) not in found
    assert found["steerllm_engine_up", ()] == 1


async def test_the_build_is_shown(serve: Serve, port: int) -> None:
    await serve(metrics_port=port)
    [labels] = [labels for name, labels in await series(port) if name == "steerllm_build_info"]
    revision, version, _ = labels
    assert version.count(".") == 2
    assert int(revision) >= 4


async def test_no_series_names_a_client_or_a_request(begin: Begin, port: int) -> None:
    gate = Gate(at=2)
    alice = await begin(FakeBackend(step=gate), metrics_port=port)
    request = asking()
    request.request_id = "of-one-request"
    running = asyncio.ensure_future(alice.generate(request))
    await bounded(gate.reached.wait())
    _, during = await get(port, "/metrics")
    gate.opened.set()
    await running
    _, after = await get(port, "/metrics")
    for page in (during, after):
        assert "alice" not in page
        assert "of-one-request" not in page
