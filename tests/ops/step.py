"""One layer of a step, planned and loaded as the worker does it, and run through the kernel under test.

T: rows of the step; D: hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from steer_service.core.positions import PositionRange
from steer_service.core.span_table import ScopeTable, SpanTable
from steer_service.core.spans import EVERYWHERE, OPEN_END, Spans, united
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringOp, SteeringSpec
from steer_service.engine.slots import BankSize, ProgramLoad
from steer_service.engine.worker.bank import ProgramBank
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.program import compile_program, program_to_bytes
from tests.ops.kernels import run_layer
from tests.ops.strategies import SEEDS, WIDTHS, operation_lists

LAYER = 0
SENTINEL = 7.0
"""What capture memory holds before anything is captured."""

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Equal bits tell more than equal numbers: NaN equals itself, and 0.0 is not -0.0."""

DTYPES = st.sampled_from(list(BITS))


@dataclass(frozen=True)
class ParsedPrompt:
    """One request of a case, and what the kernel is to do for it."""

    rows: range
    operations: Sequence[SteeringOp] = ()
    first_position: int = 0
    captured: bool = False
    row_limit: int = 1000
    steered_at: Spans | None = None
    captured_at: Spans | None = None
    captures_float32: bool = False
    reports_change: bool = False

    def position(self, row: int) -> int:
        return self.first_position + row - self.rows.start

    def steers(self, row: int) -> bool:
        return bool(self.operations_at(row))

    def scopes(self) -> list[Spans]:
        """Where the operations of each scope act; operations without positions of their own act at `steered_at`."""
        default = EVERYWHERE if self.steered_at is None else self.steered_at
        scopes = spec_of(self.operations).numbered_scopes().paths.values()
        return [default if scope is None else scope.resolve_within(0, OPEN_END) for scope in scopes]

    def operations_at(self, row: int) -> list[SteeringOp]:
        """The operations that act on a row of the step."""
        if self.is_idle():
            return []
        numbers, scopes = spec_of(self.operations).numbered_scopes().numbers[LAYER], self.scopes()
        return [
            operation
            for operation, number in zip(self.operations, numbers, strict=True)
            if is_within(self.position(row), scopes[number])
        ]

    def is_idle(self) -> bool:
        """True if its program has no operation that can change the stream, and so none at this layer."""
        return LayerSteeringSpec(operations=self.operations).is_empty()

    def captured_rows(self) -> list[int]:
        """Rows of the step that are captured, in order."""
        positions = {row: self.position(row) for row in self.rows if self.captured}
        return [row for row, at in positions.items() if at < self.row_limit and is_within(at, self.captured_at)]

    def captured_before(self) -> int:
        """How many rows of its captured positions lie before this step."""
        return sum(is_within(at, self.captured_at) for at in range(self.first_position))


def is_within(position: int, spans: Spans | None) -> bool:
    return spans is None or any(first <= position < end for first, end in spans)


class Step:
    """One layer of one step: runs the kernel in place and keeps what it needs to look at the outcome."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        residual_TD: torch.Tensor | None,
        asked: Sequence[ParsedPrompt],
        *,
        checks: bool = False,
    ) -> None:
        self.hidden_TD, self.residual_TD = hidden_TD.clone(), None if residual_TD is None else residual_TD.clone()
        width = hidden_TD.shape[1]
        self.before, self.captured = (
            [
                torch.full(
                    (one.first_position + len(one.rows), width),
                    SENTINEL,
                    dtype=torch.float32 if one.captures_float32 else hidden_TD.dtype,
                )
                for one in asked
            ]
            for _ in range(2)
        )
        bank = bank_with([one.operations for one in asked], width)
        self.plan = plan_of(asked, self.before, self.captured, check_layer=LAYER if checks else LAYER + 1)
        run_layer(self.hidden_TD, self.residual_TD, self.plan, bank, LAYER)

    @property
    def stream_TD(self) -> torch.Tensor:
        """The tensor that holds steered rows."""
        return self.hidden_TD if self.residual_TD is None else self.residual_TD


def bank_with(programs: Sequence[Sequence[SteeringOp]], width: int) -> ProgramBank:
    """A bank whose slot i holds program i; the slots were in use before, in another order."""
    size = BankSize(slots=len(programs), rows=4 * len(programs), operations_per_layer=4)
    bank = ProgramBank(size, layers=[LAYER], layer_count=1, hidden_size=width)
    for slot in reversed(range(len(programs))):
        bank.load(program_load(slot, [AddSpec(np.full(width, 1e6, np.float32))] * (1 + slot % 4)))
    for slot, operations in enumerate(programs):
        bank.load(program_load(slot, operations))
    return bank


def spec_of(operations: Sequence[SteeringOp]) -> SteeringSpec:
    return SteeringSpec(layers={LAYER: LayerSteeringSpec(operations=operations)})


def program_load(slot: int, operations: Sequence[SteeringOp]) -> ProgramLoad:
    program = compile_program(spec_of(operations))
    return ProgramLoad(slot=slot, digest=program.digest, data=program_to_bytes(program))


def plan_of(
    asked: Sequence[ParsedPrompt], before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], check_layer: int
) -> StepPlan:
    rows = [
        RequestRows(f"request-{index}", one.rows.start, len(one.rows), one.first_position)
        for index, one in enumerate(asked)
    ]
    requests = [
        PlannedRequest(
            slot=index if one.operations else NO_SLOT,
            steers_L=np.array([bool(one.operations), False]),
            before_L=np.array([before[index].data_ptr() if one.captured else 0, 0], np.int64),
            after_L=np.array([after[index].data_ptr() if one.captured else 0, 0], np.int64),
            steered=table_of(union_of(one)),
            scopes=ScopeTable.of(one.scopes()) if len(one.scopes()) > 1 else None,
            captured=table_of(one.captured_at),
            row_limit=one.row_limit,
            captures_float32=one.captures_float32,
            reports_change=one.reports_change,
        )
        for index, one in enumerate(asked)
    ]
    return build_plan(rows, requests, check_layer=check_layer)


def table_of(spans: Spans | None) -> SpanTable | None:
    return None if spans is None else SpanTable.of(spans)


def union_of(one: ParsedPrompt) -> Spans | None:
    union = united(span for spans in one.scopes() for span in spans)
    return None if union == EVERYWHERE else union


def _spans(least: int) -> st.SearchStrategy[Spans]:
    """Spans between at least so many edges up to 14; the last is open if their number is odd."""
    return st.lists(st.integers(0, 14), unique=True, min_size=least, max_size=6).map(
        lambda edges: tuple(zip(sorted(edges)[::2], [*sorted(edges), OPEN_END][1::2], strict=False))
    )


SPANS = st.none() | _spans(0)
"""Some positions up to 14, perhaps none, perhaps all from some position on."""

SCOPES = st.none() | _spans(1).map(
    lambda spans: [PositionRange(first, None if end == OPEN_END else end - 1) for first, end in spans]
)
"""Positions of one operation."""


@st.composite
def requests(draw: st.DrawFn, width: int) -> list[ParsedPrompt]:
    """Requests over some of the rows of a step, in batch order."""
    asked, next_row = [], 0
    for _ in range(draw(st.integers(1, 5))):
        first_row = next_row + draw(st.integers(0, 2))
        count = draw(st.integers(1, 4))
        first_position = draw(st.integers(0, 9))
        asked.append(
            ParsedPrompt(
                rows=range(first_row, first_row + count),
                operations=draw(operation_lists(width, positions=SCOPES)),
                first_position=first_position,
                captured=draw(st.booleans()),
                row_limit=first_position + draw(st.integers(0, 5)),
                steered_at=draw(SPANS),
                captured_at=draw(SPANS),
                captures_float32=draw(st.booleans()),
                reports_change=draw(st.booleans()),
            )
        )
        next_row = first_row + count
    return asked


@dataclass(frozen=True)
class Case:
    """Tensors of a step and the requests in it."""

    hidden_TD: torch.Tensor
    residual_TD: torch.Tensor | None
    asked: list[ParsedPrompt]

    def run(self) -> Step:
        return Step(self.hidden_TD, self.residual_TD, self.asked)

    def wide_TD(self) -> torch.Tensor:
        """The stream before steering, as the contract has it: the sum in float32."""
        return self.hidden_TD.float() if self.residual_TD is None else self.hidden_TD.float() + self.residual_TD.float()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width, dtype, seed = draw(WIDTHS), draw(DTYPES), draw(SEEDS)
    asked = draw(requests(width))
    generator = torch.Generator().manual_seed(seed)
    shape = (asked[-1].rows.stop + draw(st.integers(0, 2)), width)  # rows at the end: padding
    hidden_TD = torch.randn(shape, generator=generator).to(dtype)
    residual_TD = (torch.randn(shape, generator=generator) * 5).to(dtype) if draw(st.booleans()) else None
    return Case(hidden_TD, residual_TD, asked)


def bits(tensor: torch.Tensor) -> npt.NDArray[np.int64]:
    return tensor.view(BITS[tensor.dtype]).numpy().astype(np.int64)


def other_rows(case: Case) -> list[int]:
    steered = {row for one in case.asked for row in one.rows if one.steers(row)}
    return [row for row in range(len(case.hidden_TD)) if row not in steered]
