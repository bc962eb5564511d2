"""The trace reads back as it was written."""

from pathlib import Path

from steer_service.engine.worker.trace import TracedRows, TracedStep, TraceFile, read_trace
from steer_service.ops.plan import RequestRows

DONE = TracedRows(
    output="a/0",
    first_position=3,
    row_count=2,
    digest="d",
    steered=((3, 4),),
    steered_layers=(1, 2),
    captured=(),
    captured_layers=(),
    bad_positions=(4,),
)


def test_steps_read_back_as_written_each_workers_in_order(tmp_path: Path) -> None:
    files = [TraceFile(str(tmp_path / "steps"), worker) for worker in (0, 1)]
    files[1].write([RequestRows("x", 0, 2, 3)], [DONE])
    files[0].write([RequestRows("y", 0, 1, 0)], [])
    files[1].write([], [])
    for file in files:
        file.close()

    assert list(read_trace(tmp_path / "steps")) == [
        TracedStep(worker=0, batch=(("y", 0, 1),), done=()),
        TracedStep(worker=1, batch=(("x", 3, 2),), done=(DONE,)),
        TracedStep(worker=1, batch=(), done=()),
    ]
