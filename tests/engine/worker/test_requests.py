"""The requests that a worker runs: an upper bound on what a step of them captures."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import CaptureSite
from steer_service.core.span_table import SpanTable
from steer_service.engine.messages import WorkerRequest
from steer_service.engine.slots import BankSize
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.facts import WorkerFacts
from steer_service.engine.worker.requests import TrackedRequests
from steer_service.ops.cuda_tables import StepTables
from steer_service.ops.plan import NO_SLOT, RequestRows, build_plan
from steer_service.shm.segments import SegmentDirectory

LAYERS, WIDTH = 4, 3
ALL_LAYERS = tuple(range(LAYERS))

LAYER_SETS = st.lists(st.sampled_from(ALL_LAYERS), min_size=1, unique=True).map(lambda layers: tuple(sorted(layers)))
SITES = st.sampled_from([(CaptureSite.BEFORE,), (CaptureSite.AFTER,), (CaptureSite.BEFORE, CaptureSite.AFTER)])


def tracked_requests(held: tuple[int, ...], *, writes_rows: bool = True) -> TrackedRequests:
    """Of a rank that holds these layers, on which no request is tracked yet."""
    facts = WorkerFacts(
        layers=held,
        layer_count=LAYERS,
        stage_layers=len(held),
        hidden_size=WIDTH,
        dtype="bfloat16",
        number=0,
        stage=0,
        is_last_stage=True,
        writes_rows=writes_rows,
    )
    bank = ProgramBank(BankSize(slots=1, rows=1, operations_per_layer=1), held, LAYERS, WIDTH)
    requests = TrackedRequests(facts, bank, SegmentDirectory())
    requests.keeps_regions = True
    return requests


@st.composite
def asked(draw: st.DrawFn) -> tuple[WorkerRequest, int, int]:
    """A request that captures, the first position of its rows in a step, and their number."""
    first, count = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    start = draw(st.integers(0, 6))
    request = WorkerRequest(
        output="a/0",
        slot=NO_SLOT,
        digest="",
        steered=SpanTable.of(()),
        segment="",
        offset=0,
        stages=1,
        rows=draw(st.integers(1, 12)),
        sites=draw(SITES),
        layers=draw(LAYER_SETS),
        captured=SpanTable.of(((start, start + draw(st.integers(1, 8))),)),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        reusable_rows=0,
    )
    return request, first, count


def schedule(*requests: WorkerRequest) -> SimpleNamespace:
    """What vLLM's scheduler says in the step in which these requests start; they are numbered."""
    new = [
        SimpleNamespace(req_id=str(number), sampling_params=SimpleNamespace(extra_args=request.to_extra_args()))
        for number, request in enumerate(requests)
    ]
    return SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=new)


@given(st.lists(asked(), min_size=1, max_size=4), LAYER_SETS)
def test_a_step_never_stages_more_than_is_foreseen(
    asks: list[tuple[WorkerRequest, int, int]], held: tuple[int, ...]
) -> None:
    requests, other_rank = tracked_requests(held), tracked_requests(held, writes_rows=False)
    for one in (requests, other_rank):
        one.update(schedule(*(request for request, _, _ in asks)))
    rows, first_row = [], 0
    for number, (_, position, count) in enumerate(asks):
        rows.append(RequestRows(str(number), first_row, count, position))
        first_row += count
    tables = StepTables(
        rows=first_row, requests=4, layers=LAYERS, width=WIDTH, dtype=torch.bfloat16, staging=0, device="cpu"
    )

    plan = build_plan(rows, [requests[part.request_id].planned for part in rows], check_layer=held[-1])
    counts = {part.request_id: part.row_count for part in rows}
    foreseen = requests.staged_bytes(counts, len(held))

    assert tables.bytes_of(plan).sum() <= foreseen == other_rank.staged_bytes(counts, len(held))


def test_requests_that_capture_nothing_stage_nothing() -> None:
    requests = tracked_requests(ALL_LAYERS)

    assert requests.staged_bytes({"unknown to this worker": 1000}, LAYERS) == 0
