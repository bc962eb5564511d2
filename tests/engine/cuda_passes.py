"""The hooks of a GPU, pass after pass: what is filled, staged, copied and collected when. Run by test_cuda.py.

T: rows of the step; D: hidden size.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.core.span_table import ScopeTable
from steer_service.core.specs import SteeringSpec
from steer_service.engine.slots import BankSize, ProgramLoad
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.dummy_run import INPUTS
from steer_service.engine.worker.hooks import HookContext, visit_in_graph
from steer_service.engine.worker.hooks_cuda import MOST_STAGED, CudaForward, CudaHooks, staging_bytes
from steer_service.engine.worker.kernel_proof import prove_kernel
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.program import compile_program, program_to_bytes
from tests.engine.slow_copies import SlowCopies

LAYERS, WIDTH, ROWS = 3, 8, 6
ROW_BYTES = 4 * WIDTH


def hooks_with(
    staging: int | None = None, *, requests: int = 2, writes_rows: bool = True, pinned: int | None = None
) -> CudaHooks:
    bank = ProgramBank(BankSize(slots=2, rows=4, operations_per_layer=2), range(LAYERS), LAYERS, WIDTH)
    context = HookContext(
        bank=bank,
        layers=range(LAYERS),
        layer_count=LAYERS,
        stage_layers=LAYERS,
        hidden_size=WIDTH,
        dtype="float32",
        device=torch.device("cpu"),
        rows=ROWS,
        requests=requests,
        recorded_rows=ROWS,
        writes_rows=writes_rows,
    )
    hooks = CudaHooks(context, staging=staging, pinned=pinned)
    hooks.copies = SlowCopies()
    return hooks


def load(hooks: CudaHooks, slot: int, value: float, layer: int = 1) -> None:
    """The slot adds `value` to every element after the layer."""
    program = compile_program(SteeringSpec.simple_add(layer, np.full(WIDTH, value)))
    hooks.context.bank.load(ProgramLoad(slot=slot, digest=program.digest, data=program_to_bytes(program)))
    hooks.sync_slot(slot)


def request(hooks: CudaHooks, slot: int = NO_SLOT, captured: torch.Tensor | None = None) -> PlannedRequest:
    """A request; what is captured after steering goes to a tensor of shape [LAYERS, positions, WIDTH]."""
    return PlannedRequest(
        slot=slot,
        steers_L=np.zeros(LAYERS, bool) if slot == NO_SLOT else hooks.context.bank.op_counts_LS[:, slot] > 0,
        before_L=np.zeros(LAYERS, np.int64),
        after_L=np.array([0 if captured is None else captured[layer].data_ptr() for layer in range(LAYERS)]),
        row_limit=1000,
    )


def run(
    hooks: CudaHooks, what: PlannedRequest, stream_TD: torch.Tensor, first_position: int = 0, *, skipped: int = -1
) -> CudaForward:
    """A forward pass of one request over all rows of the stream, through the op, and all but one of the layers."""
    plan = build_plan([RequestRows("a", 0, len(stream_TD), first_position)], [what], check_layer=LAYERS - 1)
    begun = hooks.begin(plan)
    for layer in range(LAYERS):
        if layer != skipped:
            visit_in_graph(stream_TD, None, layer)
    begun.end()
    return begun


def rows(count: int, value: float) -> torch.Tensor:
    return torch.full((count, WIDTH), value)


def test_changes_are_those_of_their_own_pass_however_late_it_is_collected() -> None:
    hooks = hooks_with()
    load(hooks, 0, 1.0)
    silent = request(hooks, 0)
    begun = [run(hooks, replace(silent, reports_change=True), rows(2, value)) for value in (1.0, 4.0)]
    begun.append(run(hooks, silent, rows(2, 2.0)))

    for forward in reversed(begun):
        forward.collect()
    first, second, third = [forward.plan.changes_NLC for forward in begun]

    assert third is None
    for changes_NLC, relative in ((first, 1.0), (second, 0.25)):
        assert changes_NLC is not None
        assert changes_NLC[:, 1].tolist() == [[relative, 1.0]] * 2  # the row is its value, and 1 is added
        assert not np.delete(changes_NLC, 1, axis=1).any()


@pytest.mark.parametrize("staged_rows", [2, 4, 6, 12, 24])
@pytest.mark.parametrize("waits", [0, 1, 2, 6])
def test_forwards_collected_late_keep_their_rows_without_waiting(staged_rows: int, waits: int) -> None:
    """Two rows a pass at each layer, six in the fourth: halves, the whole, and layer by layer, in halves or not."""
    hooks = hooks_with(staging=max(staged_rows, 6) * ROW_BYTES, pinned=1 << 16)  # which holds all six
    counts = [2, 2, 2, 6, 2, 2]
    captured = torch.zeros(LAYERS, sum(counts), WIDTH)
    what, begun, first = request(hooks, captured=captured), [], 0
    for number, count in enumerate(counts):
        begun.append(run(hooks, what, rows(count, number + 1.0), first))
        first += count
        if number >= waits:
            begun[number - waits].collect()
    assert hooks.copies.waits == max(len(counts) - waits, 0)  # only who collected has waited
    for passed in begun:
        passed.collect()

    want_T = torch.tensor([number + 1.0 for number, count in enumerate(counts) for _ in range(count)])
    assert torch.equal(captured, want_T[None, :, None].expand_as(captured))
    assert all(passed.plan.visited == set(range(LAYERS)) for passed in begun)


@pytest.mark.parametrize("staged_rows", [6, 12, 24])
def test_a_pass_that_finds_no_memory_on_the_host_delivers_the_rows_of_the_oldest(staged_rows: int) -> None:
    """Whoever collects the passes, and however late: the host's memory is what it was at the start."""
    hooks = hooks_with(staging=staged_rows * ROW_BYTES)
    memory = hooks.rows_ring.size
    counts = [2, 6, 2, 2, 6, 2, 2, 2]
    captured = torch.zeros(LAYERS, sum(counts), WIDTH)
    what, begun, first = request(hooks, captured=captured), [], 0
    for number, count in enumerate(counts):
        begun.append(run(hooks, what, rows(count, number + 1.0), first))
        first += count
    assert hooks.copies.waits > 0
    for passed in reversed(begun):
        passed.collect()

    want_T = torch.tensor([number + 1.0 for number, count in enumerate(counts) for _ in range(count)])
    assert torch.equal(captured, want_T[None, :, None].expand_as(captured))
    assert all(passed.plan.visited == set(range(LAYERS)) for passed in begun)
    assert hooks.rows_ring.size == memory == staged_rows * ROW_BYTES
    assert not hooks.rows_ring._parts
    assert not hooks.report_ring._parts


def test_notes_are_those_of_their_own_pass() -> None:
    hooks = hooks_with()
    load(hooks, 0, 3e38)
    huge_TD, good_TD, captured = rows(2, 3e38), rows(2, 1.0), torch.zeros(LAYERS, 2, WIDTH)

    bad = run(hooks, request(hooks, slot=0), huge_TD)
    missed = run(hooks, request(hooks, captured=captured), good_TD, skipped=1)
    for passed in (missed, bad):
        passed.collect()

    assert bad.plan.bad_N.tolist() == [1, 1]
    assert torch.equal(huge_TD, rows(2, 3e38))
    assert not missed.plan.bad_N.any()
    assert missed.plan.unvisited(range(LAYERS)) == [1]


def test_a_slot_does_what_was_loaded_last_and_others_what_they_did() -> None:
    hooks = hooks_with()
    load(hooks, 0, 1.0)
    load(hooks, 1, 5.0)
    load(hooks, 0, 2.0)
    first_TD, second_TD = rows(2, 0.0), rows(2, 0.0)

    run(hooks, request(hooks, slot=0), first_TD).collect()
    run(hooks, request(hooks, slot=1), second_TD).collect()

    assert torch.equal(first_TD, rows(2, 2.0))
    assert torch.equal(second_TD, rows(2, 5.0))


class DeviceWork(TorchDispatchMode):
    """Names of the operations that write to the device's tables or read them, in order; views are none."""

    def __init__(self, hooks: CudaHooks) -> None:
        super().__init__()
        tables = hooks.tables
        self._memory = {one.untyped_storage().data_ptr() for one in (tables.header, tables.changes_TLC, tables.staging)}
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if not func.is_view and any(one.untyped_storage().data_ptr() in self._memory for one in tensors):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_pass_is_one_copy_a_launch_for_each_layer_the_copy_of_its_report_and_one_clearing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks = hooks_with()
    load(hooks, 0, 1.0)
    monkeypatch.setattr(CudaHooks, "launch", lambda *_: work.names.append("launch"))
    captured = torch.zeros(LAYERS, 2, WIDTH)
    steered, captures = request(hooks, slot=0), request(hooks, slot=0, captured=captured)
    scoped = replace(steered, scopes=ScopeTable(np.zeros(1, np.int64), np.array([1], np.uint64)))
    reports = replace(steered, reports_change=True)
    launches = ["launch"] * LAYERS
    for what, before, after in (
        (steered, ["copy_"], ["copy_", "zero_"]),
        (scoped, ["copy_"], ["copy_", "zero_"]),
        (reports, ["zero_", "copy_"], ["copy_", "copy_", "zero_"]),
    ):
        with DeviceWork(hooks) as work:
            run(hooks, what, rows(2, 0.0))
        assert work.names == [*before, *launches, *after]
    with DeviceWork(hooks) as work:
        passed = run(hooks, captures, rows(2, 0.0))
    assert work.names == ["copy_", *launches, "copy_", "zero_"]
    with DeviceWork(hooks) as work:  # while later passes run
        passed.collect()
    assert work.names == ["copy_"]


def test_between_passes_hooks_do_nothing_and_are_launched_only_to_be_recorded() -> None:
    hooks = hooks_with()
    load(hooks, 0, 1.0)
    run(hooks, request(hooks, slot=0), rows(2, 0.0)).collect()
    stream_TD = rows(2, 0.0)
    hooks.tables.visited_L.zero_()

    visit_in_graph(stream_TD, None, 1)
    assert not hooks.tables.visited_L.any()
    hooks.copies.is_recording = True  # type: ignore[misc]
    visit_in_graph(stream_TD, None, 1)

    assert hooks.tables.visited_L.tolist() == [0, 1, 0]
    assert torch.equal(stream_TD, rows(2, 0.0))


def test_a_pass_that_raised_leaves_nothing_behind() -> None:
    hooks = hooks_with()
    load(hooks, 0, 1.0)
    captured = torch.zeros(LAYERS, 4, WIDTH)
    what = request(hooks, slot=0, captured=captured)
    void = hooks.begin(build_plan([RequestRows("a", 0, 2, 0)], [what], check_layer=LAYERS - 1))
    visit_in_graph(rows(2, 7.0), None, 0)
    void.discard()

    for first in (0, 2):
        run(hooks, what, rows(2, 1.0), first).collect()
    void.collect()

    assert torch.equal(captured[0], rows(4, 1.0))
    assert torch.equal(captured[1], rows(4, 2.0))


def test_rows_that_could_not_be_copied_in_time_stop_the_engine() -> None:
    """As if a graph had been replayed, which calls no hook, that is larger than the staging buffer was made for."""
    hooks = hooks_with(staging=2 * ROW_BYTES)
    captured = torch.zeros(LAYERS, 2, WIDTH)
    what = request(hooks, captured=captured)
    begun = hooks.begin(build_plan([RequestRows("a", 0, 2, 0)], [what], check_layer=LAYERS - 1))
    for layer in range(LAYERS):
        hooks.launch(rows(2, 1.0), None, layer)
    begun.end()

    with pytest.raises(EngineFailed, match=r"layers \[0, 1, 2\] were not copied") as raised:
        begun.collect()
    assert raised.value.reason == "STAGING_FULL"


def plan_capturing(hooks: CudaHooks, sites: int, *, requests: int = 1) -> StepPlan:
    """A step of all rows, each captured at all layers and one site or both."""
    where = request(hooks, captured=torch.zeros(LAYERS, ROWS, WIDTH))
    what = replace(where, before_L=where.after_L) if sites == 2 else where
    each = ROWS // requests
    rows_R = [RequestRows(str(number), each * number, each, 0) for number in range(requests)]
    return build_plan(rows_R, [what] * requests, check_layer=LAYERS - 1)


def test_the_largest_graph_fits_the_staging_buffer_at_all_layers_and_one_site() -> None:
    hooks = hooks_with()
    for requests in (1, 2):
        size = hooks.tables.bytes_of(plan_capturing(hooks, 1, requests=requests)).sum()
        assert size <= staging_bytes(hooks.context) == hooks.graph_bytes == hooks.staging_bytes
    both = hooks.tables.bytes_of(plan_capturing(hooks, 2)).sum()
    assert hooks.graph_bytes < both <= ROWS * hooks.context.most_row_bytes


def test_one_layer_of_the_largest_step_fits_the_smallest_staging_buffer_that_may_be_asked_for() -> None:
    context = replace(hooks_with().context, recorded_rows=0)
    least = staging_bytes(context)
    hooks = CudaHooks(replace(context, staging_bytes=least))
    assert hooks.staging_bytes == least
    assert hooks.tables.bytes_of(plan_capturing(hooks, 2, requests=2)).max() <= least
    assert CudaHooks(replace(context, staging_bytes=1 << 20)).graph_bytes == 1 << 20

    with pytest.raises(Unsupported, match=f"{least} bytes for max_num_batched_tokens={ROWS}") as raised:
        CudaHooks(replace(context, staging_bytes=least - 1))
    assert raised.value.reason == "STAGING_TOO_SMALL"


@pytest.mark.parametrize("writes_rows", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_of_the_kernel_fits_the_staging_buffer_of_every_rank(dtype: str, writes_rows: bool) -> None:
    bank = ProgramBank(BankSize(slots=16, rows=64, operations_per_layer=4), range(LAYERS), LAYERS, WIDTH)
    context = replace(
        hooks_with().context, bank=bank, dtype=dtype, rows=64, requests=16, recorded_rows=0, writes_rows=writes_rows
    )
    assert prove_kernel(context, CudaHooks(context)).worst <= 1.0


def test_no_more_is_staged_than_the_tables_can_address() -> None:
    context = hooks_with().context
    assert staging_bytes(replace(context, hidden_size=1 << 16, recorded_rows=1 << 20)) == MOST_STAGED
    for too_large in ({"staging_bytes": MOST_STAGED + 1}, {"hidden_size": 1 << 16, "rows": 1 << 20}):
        with pytest.raises(Unsupported, match=f"at most {MOST_STAGED} can be addressed") as raised:
            staging_bytes(replace(context, **too_large))
        assert raised.value.reason == "STAGING_TOO_LARGE"


def test_ranks_with_fewer_layers_or_no_rows_of_their_own_let_graphs_replay_the_same_steps() -> None:
    context = hooks_with().context
    hooks = [
        CudaHooks(replace(context, **other)) for other in ({}, {"layers": range(LAYERS - 1)}, {"writes_rows": False})
    ]
    assert len({one.graph_bytes for one in hooks}) == 1
    assert hooks[2].staging_bytes < hooks[0].staging_bytes


def test_the_self_test_fits_the_staging_buffer_of_a_rank_that_writes_no_rows() -> None:
    hooks = hooks_with(requests=INPUTS, writes_rows=False)
    captured = torch.zeros(INPUTS, LAYERS, 1, WIDTH)
    plan = build_plan(
        [RequestRows(str(row), row, 1, 0) for row in range(INPUTS)],
        [request(hooks, captured=captured[row]) for row in range(INPUTS)],
        check_layer=LAYERS - 1,
    )
    begun = hooks.begin(plan)
    stream_TD = torch.arange(INPUTS * WIDTH, dtype=torch.float32).reshape(INPUTS, WIDTH)
    for layer in range(LAYERS):
        visit_in_graph(stream_TD, None, layer)
    begun.end()
    begun.collect()

    assert type(begun) is CudaForward  # a graph's passes are staged whole
    assert torch.equal(captured[:, :, 0], stream_TD[:, None].expand(INPUTS, LAYERS, WIDTH))
    assert len(hooks.tables.staging) < staging_bytes(replace(hooks.context, writes_rows=True))


def test_a_stream_that_the_kernel_would_misread_stops_the_step() -> None:
    hooks = hooks_with()
    load(hooks, 0, 1.0)
    begun = hooks.begin(build_plan([RequestRows("a", 0, 2, 0)], [request(hooks, slot=0)], check_layer=LAYERS - 1))

    with pytest.raises(EngineFailed, match="a layer returned torch"):
        visit_in_graph(rows(1, 0.0), None, 1)
    begun.discard()
