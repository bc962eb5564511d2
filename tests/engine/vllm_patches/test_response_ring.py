"""The ring of a worker has the size that the variable says; larger messages still arrive."""

import inspect

import pytest
from vllm.v1.executor import multiproc_executor

from steer_service.engine.vllm_patches.response_ring import bound_response_ring
from steer_service.shm.message_rings import CORE_MIB, PARTS, VARIABLE, WORKER_MIB


@pytest.fixture(autouse=True)
def own_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiproc_executor, "MessageQueue", multiproc_executor.MessageQueue)


def test_the_ring_of_a_worker_is_as_small_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    bound_response_ring()
    queue = multiproc_executor.MessageQueue(1, 1)  # as in WorkerProc._init_message_queues
    assert queue.buffer.total_bytes_of_buffer == pytest.approx(PARTS << 20, abs=1000)
    large = multiproc_executor.MessageQueue(1, 1, max_chunk_bytes=2 << 20)
    assert large.buffer.max_chunk_bytes == 2 << 20


@pytest.mark.parametrize("value", ["", "0", "24", "64", "much"])
def test_other_values_leave_vllms_own_ring(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    before = multiproc_executor.MessageQueue
    monkeypatch.setenv(VARIABLE, value)
    bound_response_ring()
    assert multiproc_executor.MessageQueue is before


def test_vllms_own_sizes_are_those_of_the_rule() -> None:
    parameters = inspect.signature(multiproc_executor.MessageQueue.__init__).parameters
    assert parameters["max_chunk_bytes"].default == WORKER_MIB << 20
    assert parameters["max_chunks"].default == PARTS
    assert "MessageQueue(1, 1)" in inspect.getsource(multiproc_executor.WorkerProc._init_message_queues)
    import vllm.envs

    assert vllm.envs.environment_variables[VARIABLE]() == CORE_MIB
