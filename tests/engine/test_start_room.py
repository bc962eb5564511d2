"""Before the engine starts: `/dev/shm` has room for the rings between vLLM's processes, or a sentence says why not."""

import os
from pathlib import Path

import pytest

from steer_service.core.errors import EngineFailed
from steer_service.engine import start
from steer_service.engine.config import engine_args_for
from steer_service.shm.message_rings import VARIABLE

MIB = 1 << 20


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that what the test sets is undone
    monkeypatch.delenv(VARIABLE)


def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_bytes: int | None) -> None:
    monkeypatch.setattr(start, "MEMORY", str(tmp_path))
    monkeypatch.setattr(start, "_free_bytes", lambda memory: free_bytes)
    monkeypatch.setattr("steer_service.shm.message_rings.free_bytes_of", lambda folder: free_bytes)


def test_rings_become_small_where_dev_shm_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room(monkeypatch, tmp_path, 64 * MIB)
    start.choose_rings(engine_args_for("m", {}), tmp_path)
    assert os.environ[VARIABLE] == "1"


def test_vllms_own_rings_stay_where_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room(monkeypatch, tmp_path, None)
    start.choose_rings(engine_args_for("m", {}), tmp_path)
    assert VARIABLE not in os.environ


def test_too_little_room_is_one_sentence_with_both_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room(monkeypatch, tmp_path, 20 * MIB)
    with pytest.raises(EngineFailed, match=r"20 MiB free, and 24 MiB are needed.*--shm-size") as raised:
        start.choose_rings(engine_args_for("m", {}), tmp_path)
    assert raised.value.reason == "SHM_TOO_SMALL"
    assert VARIABLE not in os.environ


def test_every_worker_has_a_ring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room(monkeypatch, tmp_path, 20 * MIB)
    with pytest.raises(EngineFailed, match="and 68 MiB are needed"):
        start.choose_rings(engine_args_for("m", {"tensor_parallel_size": 3}), tmp_path)


def test_one_worker_within_the_engine_core_needs_no_ring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room(monkeypatch, tmp_path, 20 * MIB)
    monkeypatch.setattr(type(start.current_platform), "is_cpu", lambda platform: False)
    start.choose_rings(engine_args_for("m", {}), tmp_path)
    with pytest.raises(EngineFailed):
        start.choose_rings(engine_args_for("m", {"distributed_executor_backend": "mp"}), tmp_path)
