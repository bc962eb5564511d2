"""The proof of the kernel: seeded rows and programs of every kind, against float64.

They go through the hooks of the device, as in a step: tables, kernel, staging and copies. Each steered row must be
within the tolerance of docs/numerics.md, each captured row right bit for bit, and each other row untouched.

T: rows of the step; D: hidden size; L: layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from steer_service.core.positions import scope_from
from steer_service.core.span_table import ScopeTable, SpanTable
from steer_service.core.spans import EVERYWHERE, OPEN_END, united
from steer_service.core.specs import (
    AblationSpec,
    AddScaling,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.engine.worker.hooks import HookContext, Hooks
from steer_service.engine.worker.proof_checks import has_same_bits
from steer_service.engine.worker.proof_programs import ProofPrograms
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.truth import acts_on, truth_of, verdict_on

ROWS_PER_PROGRAM = 4
"""Rows of each program, at the positions 0 to 3; fewer if a step of the model has no room."""

HUGE = 3e38
"""Added to every element, it makes a row bad in every dtype."""

UNTOUCHED = 7.0
"""What the memory of captured rows holds before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelProof:
    """What was compared, and how far the worst row was off."""

    rows: int
    """Rows that were compared."""
    worst: float
    """The largest error of a steered row in units of the tolerance; above 1 the proof fails."""


class KernelFault(Exception):
    """A row that is not right; the text says which one, and how far it is off."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Case:
    """One request of a pass: its operations, and the memory of its captured rows."""

    operations: Sequence[SteeringOp]
    """Empty for a request without a program."""
    first_row: int
    """Its first row in the step."""
    captures_float32: bool
    """As in PlannedRequest."""
    before_TD: torch.Tensor
    """Its rows before steering."""
    after_TD: torch.Tensor
    """Its rows after steering."""

    @property
    def count(self) -> int:
        """The number of its rows."""
        return len(self.before_TD)

    @property
    def rows(self) -> slice:
        """Its rows in the step."""
        return slice(self.first_row, self.first_row + self.count)


def prove_kernel(context: HookContext, hooks: Hooks) -> KernelProof:
    """Runs every program after the first and the last layer, with one tensor and with two; raises KernelFault."""
    programs, at_once = _programs(context), _programs_at_once(context)
    rows, worst = 0, 0.0
    for layer, has_residual in product(sorted({context.layers[0], context.layers[-1]}), (False, True)):
        for number in range(0, len(programs), at_once):
            part = programs[number : number + at_once]
            cases = [_case(context, index, operations) for index, operations in enumerate(part)]
            rows += sum(case.count for case in cases)
            where = f"after layer {layer}, with {'two tensors' if has_residual else 'one tensor'} of {context.dtype}"
            try:
                worst = max(worst, _prove_pass(context, hooks, layer, cases, has_residual=has_residual))
            except KernelFault as fault:
                raise KernelFault(f"the kernel on {context.device.type}, {where}: {fault}") from fault
    return KernelProof(rows=rows, worst=worst)


def rows_at_once(context: HookContext) -> int:
    """Most rows of one pass, each captured at both sites of one layer, some in float32."""
    return min(len(_programs(context)), _programs_at_once(context)) * _rows_per_program(context)


def _case(context: HookContext, index: int, operations: Sequence[SteeringOp]) -> _Case:
    captures_float32 = index % 2 == 1
    kind = torch.float32 if captures_float32 else getattr(torch, context.dtype)
    count = _rows_per_program(context)
    before_TD, after_TD = torch.full((2, count, context.hidden_size), UNTOUCHED, dtype=kind)
    return _Case(
        operations=operations,
        first_row=index * count,
        captures_float32=captures_float32,
        before_TD=before_TD,
        after_TD=after_TD,
    )


def _rows_per_program(context: HookContext) -> int:
    return min(ROWS_PER_PROGRAM, context.rows)


def _programs_at_once(context: HookContext) -> int:
    """How many programs fit into one pass: rows, requests, slots and the bank bound them."""
    size = len(context.bank.directions_WD) // context.bank.op_rows_LSK.shape[2]
    rows = (context.rows - 1) // _rows_per_program(context)  # one row stays without a request
    return max(1, min(rows, context.requests, context.bank.op_counts_LS.shape[1], size))


def _programs(context: HookContext) -> list[Sequence[SteeringOp]]:
    """The operations of each request: every kind alone, several in every order, on some rows, bad ones, and none."""
    rng = np.random.default_rng(0)
    width, longest = context.hidden_size, min(context.bank.op_rows_LSK.shape[2], len(context.bank.directions_WD))
    add, cap, ablation = (
        AddSpec(_vector(rng, width), 1.5),
        ProjectionCapSpec(_vector(rng, width), min=-0.1, max=0.2),
        AblationSpec(_vector(rng, width), -0.5),
    )
    first, later = (
        replace(operation, positions=scope_from(places)) for operation, places in ((add, [0, 2]), (ablation, [1, 2]))
    )
    programs: list[Sequence[SteeringOp]] = [
        [add],
        [cap],
        [AblationSpec(_vector(rng, width))],
        [add, cap, ablation],
        [ablation, add, cap],
        [cap, ablation, add],
        [AddSpec(_vector(rng, width), 0.3, scaling=AddScaling.RELATIVE)],
        [replace(add, max_relative_change=0.1), replace(ablation, keep_norm=True)],
        [ProjectionCapSpec(_vector(rng, width), max=0.0, keep_norm=True)],
        [AddSpec(np.full(width, HUGE, np.float32))],
        [],
    ]
    if _rows_per_program(context) == ROWS_PER_PROGRAM:  # else it has no such positions
        programs.append([first, later])
    return [program[:longest] for program in programs]


def _vector(rng: np.random.Generator, width: int) -> npt.NDArray[np.float32]:
    vector_D = rng.normal(size=width)
    vector_D[0] += 0.1  # a single element may come out as almost nothing
    return vector_D.astype(np.float32)


def _prove_pass(context: HookContext, hooks: Hooks, layer: int, cases: Sequence[_Case], *, has_residual: bool) -> float:
    """Steers and captures the rows of one step after one layer; returns the largest error in tolerances."""
    dtype = getattr(torch, context.dtype)
    planned = sum(case.count for case in cases)
    count = min(context.rows, planned + 1)
    generator = torch.Generator().manual_seed(layer)
    sizes_T = 10.0 ** (3.0 * torch.rand(count, 1, generator=generator) - 1.0)
    streams = [
        (torch.randn(count, context.hidden_size, generator=generator) * sizes_T).to(dtype)
        for _ in range(1 + has_residual)
    ]
    there = [tensor.to(context.device, copy=True) for tensor in streams]
    with ProofPrograms(context, hooks) as programs:
        for slot, case in enumerate(cases):
            if case.operations:
                programs.load(slot, _spec(layer, case.operations))
        plan = _plan(context, layer, cases)
        forward = hooks.begin(plan)
        try:
            forward.visit(there[0], there[1] if has_residual else None, layer)
        except BaseException:
            forward.discard()
            raise
        forward.end()
        forward.collect()
    if layer not in plan.visited:
        raise KernelFault("the kernel did not run")
    after = [tensor.cpu() for tensor in there]
    if not _is_same(streams, after, slice(planned, None)):
        raise KernelFault("a row of no request was changed")
    bad_T = plan.bad_N != 0
    return max(_prove_case(case, streams, after, bad_T[case.rows], context.dtype) for case in cases)


def _spec(layer: int, operations: Sequence[SteeringOp]) -> SteeringSpec:
    return SteeringSpec(layers={layer: LayerSteeringSpec(tuple(operations))})


def _plan(context: HookContext, layer: int, cases: Sequence[_Case]) -> StepPlan:
    rows = [RequestRows(str(number), case.first_row, case.count, 0) for number, case in enumerate(cases)]
    requests = [_planned(context, layer, slot, case) for slot, case in enumerate(cases)]
    return build_plan(rows, requests, check_layer=context.layers[-1])


def _planned(context: HookContext, layer: int, slot: int, case: _Case) -> PlannedRequest:
    steers_L = np.zeros(context.layer_count, bool)
    before_L, after_L = np.zeros((2, context.layer_count), np.int64)
    before_L[layer], after_L[layer] = case.before_TD.data_ptr(), case.after_TD.data_ptr()
    scopes = []
    if case.operations:
        steers_L = context.bank.op_counts_LS[:, slot] > 0
        paths = _spec(layer, case.operations).numbered_scopes().paths.values()
        scopes = [EVERYWHERE if scope is None else scope.resolve_within(0, OPEN_END) for scope in paths]
    union = united(span for spans in scopes for span in spans)
    return PlannedRequest(
        slot=slot if case.operations else NO_SLOT,
        steers_L=steers_L,
        before_L=before_L,
        after_L=after_L,
        steered=None if not scopes or union == EVERYWHERE else SpanTable.of(union),
        scopes=ScopeTable.of(scopes) if len(scopes) > 1 else None,
        row_limit=case.count,
        captures_float32=case.captures_float32,
    )


def _prove_case(
    case: _Case, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], bad_T: npt.NDArray[np.bool_], dtype: str
) -> float:
    """Compares the rows of one request; returns the largest error in tolerances."""
    operations = case.operations
    positions_T = np.arange(case.count, dtype=np.int32)
    wide_TD = sum((tensor[case.rows].float() for tensor in before[1:]), before[0][case.rows].float())
    truth = truth_of(wide_TD.double().numpy(), operations, positions_T)
    acts_T = np.zeros(case.count, bool)
    for operation in operations:
        acts_T |= acts_on(operation, positions_T)
    stored_TD = after[-1][case.rows]
    verdict = verdict_on(dtype, np.where(acts_T[:, None], stored_TD.double().numpy(), truth.rows_TD), bad_T, truth)
    name = _name_of(case)
    if verdict.finding:
        raise KernelFault(f"{name}: {verdict.finding}")
    written_T = torch.from_numpy(acts_T & ~bad_T)
    for row in np.flatnonzero(~written_T.numpy()):
        if not _is_same(before, after, slice(case.first_row + row, case.first_row + row + 1)):
            raise KernelFault(f"{name}: row {row}, which is not steered there, was changed")
    if len(after) == 2 and bool(after[0][case.rows][written_T].any()):
        raise KernelFault(f"{name}: a steered row is not in one tensor alone")
    seen_TD = torch.where(written_T[:, None], stored_TD.float(), wide_TD)
    for site, captured_TD, want_TD in (("before", case.before_TD, wide_TD), ("after", case.after_TD, seen_TD)):
        if not torch.equal(captured_TD, want_TD.to(captured_TD.dtype)):
            raise KernelFault(f"{name}: rows captured {site} steering, in {captured_TD.dtype}, differ from the stream")
    return float(np.nan_to_num(verdict.ratio_T, nan=0.0).max())


def _name_of(case: _Case) -> str:
    kinds = [type(operation).__name__.removesuffix("Spec") for operation in case.operations]
    return " then ".join(kinds) or "no program"


def _is_same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], rows: slice) -> bool:
    return all(has_same_bits(old[rows], new[rows]) for old, new in zip(before, after, strict=True))
