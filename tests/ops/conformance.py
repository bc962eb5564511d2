"""What every backend must pass: hostile programs against a float64 oracle, within the tolerance of docs/numerics.md.

A backend is a function that takes a stream and the operations of one layer and returns the steered rows and which of
them are bad. `python -m tests.ops.conformance` measures the maxima of the tables in docs/numerics.md, with 10,000
cases or as many as STEERLLM_TEST_CASES says; with TRITON_INTERPRET=1 those of the GPU's kernel, interpreted.

T: rows; D: hidden size; K: operations.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from steer_service.core.positions import PositionScope
from steer_service.core.span_table import ScopeTable, SpanTable
from steer_service.core.spans import EVERYWHERE, united
from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.ops.plan import PlannedRequest, RequestRows, build_plan
from steer_service.ops.program import LayerProgram, compile_program
from steer_service.ops.reference import apply_operation
from steer_service.ops.truth import Truth, acts_on, truth_of, verdict_on
from tests.ops.kernels import CASES, KERNEL, run_layer

Float64Array = npt.NDArray[np.float64]
Verdict = tuple[torch.Tensor, npt.NDArray[np.bool_]]
"""The steered rows, shape [T, D], and which of them are bad, shape [T]; a bad row is as it was."""

Backend = Callable[[torch.Tensor, Sequence[SteeringOp]], Verdict]
"""(residual stream, operations) -> steered rows; the stream is [T, D] in a dtype of DTYPES, as rows are."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(backend: Backend, stream_TD: torch.Tensor, operations: Sequence[SteeringOp], truth: Truth) -> Float64Array:
    """Asserts that the backend keeps the contract; returns each row's error in units of the tolerance, NaN if bad."""
    got_TD, bad_T = backend(stream_TD, operations)
    assert torch.equal(got_TD[bad_T], stream_TD[bad_T]), f"{stream_TD.dtype}: a bad row was steered"
    return judge(str(stream_TD.dtype).removeprefix("torch."), got_TD, bad_T, truth)


def judge(dtype: str, got_TD: torch.Tensor, bad_T: npt.NDArray[np.bool_], truth: Truth) -> Float64Array:
    """`check` of rows that are there, which a model of this dtype has written, whatever holds them now."""
    verdict = verdict_on(dtype, got_TD.double().numpy(), bad_T, truth)
    assert not verdict.finding, verdict.finding
    return verdict.ratio_T


def reference(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    """`ops/reference.py` in float32, rounded once."""
    rows_TD = stream_TD.float()
    for operation in operations:
        acts_T = torch.from_numpy(acts_on(operation, np.arange(len(rows_TD), dtype=np.int32)))
        rows_TD = torch.where(acts_T[:, None], apply_operation(rows_TD, operation), rows_TD)
    rows_TD = rows_TD.to(stream_TD.dtype)
    bad_T = ~rows_TD.float().square().sum(dim=1).isfinite()
    return torch.where(bad_T[:, None], stream_TD, rows_TD), bad_T.numpy()


@lru_cache(maxsize=1)  # a case runs in three dtypes
def _compiled(operations: tuple[SteeringOp, ...]) -> tuple[LayerProgram | None, list[PositionScope | None]]:
    spec = SteeringSpec(layers={0: LayerSteeringSpec(operations)})
    return compile_program(spec).layers.get(0), list(spec.numbered_scopes().paths.values())


@dataclass(frozen=True, slots=True)
class _Bank:
    """A bank that holds one layer of one program."""

    op_rows_LSK: npt.NDArray[np.int32]
    op_counts_LS: npt.NDArray[np.int32]
    directions_WD: npt.NDArray[np.float32]
    coefficients_WC: npt.NDArray[np.float32]


def kernel(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    """The kernel under test (see kernels.py), as after a layer that returns one tensor."""
    rows_TD = stream_TD.clone()
    part, scopes = _compiled(tuple(operations))
    if part is None:
        return rows_TD, np.zeros(len(rows_TD), bool)
    rows = len(rows_TD)
    spans = [EVERYWHERE if scope is None else scope.resolve_within(rows, rows) for scope in scopes]
    nowhere_L = np.zeros(1, np.int64)
    request = PlannedRequest(
        slot=0,
        steers_L=np.ones(1, bool),
        before_L=nowhere_L,
        after_L=nowhere_L,
        steered=SpanTable.of(united(chain.from_iterable(spans))),
        scopes=ScopeTable.of(spans) if len(spans) > 1 else None,
        row_limit=0,
    )
    plan = build_plan([RequestRows("", 0, len(rows_TD), 0)], [request], check_layer=0)
    bank = _Bank(
        np.arange(len(part.coefficients), dtype=np.int32)[None, None],
        np.array([[len(part.coefficients)]], np.int32),
        part.directions,
        part.coefficients,
    )
    run_layer(rows_TD, None, plan, bank)
    return rows_TD, plan.bad_N != 0


BACKENDS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "reference": (reference, ("float32",)),  # what it does beyond float32 is one rounding by torch
    KERNEL: (kernel, tuple(DTYPES)),
}
"""Each backend of this process and the dtypes in which it is checked."""


KINDS = ("add", "cap", "ablation")
WIDTHS = (1, 2, 3, 16, 64, 200, 576, 4096)
"""Hidden sizes of the measurement."""
RELATIONS = ("fresh", "same", "near", "stream")
"""How a direction lies to the one before it (or to the stream): hard cases are almost parallel ones."""
BOUNDS = ("inside", "below", "above", "equal", "at", "min inside", "min outside", "max inside", "max outside")
"""Where a cap's bounds lie to the first row's projection; "equal": min is max, "at": min is the projection."""


@dataclass(frozen=True)
class OperationShape:
    """What is random about an operation, but for the numbers of its direction."""

    kind: str
    relation: str
    norm: float
    """Of its vector."""
    scale: float
    """Of an Add or an ablation."""
    bounds: str
    """Of a cap."""
    is_relative: bool = False
    """Whether the scale of an Add is relative."""
    limit: float | None = None
    """Its `max_relative_change`."""
    keep_norm: bool = False
    rows: str = "all"
    """On which rows it acts."""


@dataclass(frozen=True)
class CaseShape:
    """What is random about a case, but for single numbers, which come from the seed."""

    width: int
    seed: int
    magnitudes: tuple[float, ...]
    """Of the stream's elements, for each row."""
    operations: tuple[OperationShape, ...]

    def build(self) -> tuple[Float64Array, list[SteeringOp]]:
        """The stream and the operations."""
        rng = np.random.default_rng(self.seed)
        stream_TD = rng.normal(size=(len(self.magnitudes), self.width)) * np.array(self.magnitudes)[:, None]
        directions_KD = rng.normal(size=(len(self.operations) + 1, self.width))
        directions_KD[np.abs(directions_KD) < 1e-3] = 1e-3  # a width of 1 must not give a vector of almost nothing
        row_D, previous_D, operations = stream_TD[0], directions_KD[-1], list[SteeringOp]()
        for shape, fresh_D in zip(self.operations, directions_KD, strict=False):
            direction_D = _related(shape.relation, fresh_D, previous_D, row_D)
            vector = (direction_D * (shape.norm / np.linalg.norm(direction_D))).astype(np.float32)
            unit_D = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))
            plain = _operation(shape, vector, float(row_D @ unit_D))
            places = {"all": None, "first": 0, "last": len(stream_TD) - 1}
            options = {"max_relative_change": shape.limit, "keep_norm": shape.keep_norm}
            operations.append(replace(plain, positions=places[shape.rows], **options))
            row_D = truth_of(row_D[None], [operations[-1]]).rows_TD[0] if shape.rows != "last" else row_D
            previous_D = direction_D
        return stream_TD, operations


def _related(relation: str, fresh_D: Float64Array, previous_D: Float64Array, row_D: Float64Array) -> Float64Array:
    match relation:
        case "same":
            return previous_D
        case "near":
            return previous_D + 1e-4 * np.linalg.norm(previous_D) / np.linalg.norm(fresh_D) * fresh_D
        case "stream" if np.linalg.norm(row_D) > 0:
            return row_D / np.linalg.norm(row_D) + 1e-6 * fresh_D
    return fresh_D


def _operation(shape: OperationShape, vector: npt.NDArray[np.float32], p: float) -> SteeringOp:
    match shape.kind:
        case "add":
            return AddSpec(vector, shape.scale, scaling="relative" if shape.is_relative else "absolute")
        case "ablation":
            return AblationSpec(vector, shape.scale)
    p = float(np.clip(p, -1e30, 1e30))  # bounds are float32
    by = 0.5 * abs(p) + 1e-3
    match shape.bounds:
        case "inside":
            return ProjectionCapSpec(vector, p - by, p + by)
        case "below":
            return ProjectionCapSpec(vector, p - 2 * by, p - by)
        case "above":
            return ProjectionCapSpec(vector, p + by, p + 2 * by)
        case "equal":
            return ProjectionCapSpec(vector, 0.5 * p, 0.5 * p)
        case "at":
            return ProjectionCapSpec(vector, p, p + by)
    at = p + by if shape.bounds in ("min outside", "max inside") else p - by
    return ProjectionCapSpec(vector, min=at) if shape.bounds.startswith("min") else ProjectionCapSpec(vector, max=at)


def check_case(shape: CaseShape) -> dict[tuple[str, str], Float64Array]:
    """Runs one case on every backend and dtype; returns the errors in units of the tolerance."""
    wide_TD, operations = shape.build()
    float32_TD = torch.from_numpy(wide_TD).float()
    narrow_TD = float32_TD.half().bfloat16()  # what both 16-bit dtypes hold, so that they share one truth
    ratios = {}
    for stream_TD, dtypes in ((float32_TD, ("float32",)), (narrow_TD, ("bfloat16", "float16"))):
        truth = truth_of(stream_TD.double().numpy(), operations)
        for dtype in dtypes:
            for name, (backend, served) in BACKENDS.items():
                if dtype in served:
                    ratios[name, dtype] = check(backend, stream_TD.to(DTYPES[dtype]), operations, truth)
    return ratios


def random_operation(rng: np.random.Generator, kind: str, *, norms: float = 0.5, parts: float = 0.4) -> OperationShape:
    """Mostly of the size that users give, sometimes far from it.

    `norms` is the probability of something that depends on norms, `parts` that of acting on some rows only.
    """
    is_usual = rng.random() < 0.7
    limit, keep, relative = rng.random(3) < 0.5 if rng.random() < norms else (False, False, False)
    return OperationShape(
        kind=kind,
        relation=str(rng.choice(RELATIONS)),
        norm=10.0 ** (rng.uniform(-2, 2) if is_usual else rng.uniform(-20, 20)),
        scale=float(rng.choice([-1, 1]) * 10.0 ** (rng.uniform(-2, 1) if rng.random() < 0.7 else rng.uniform(-6, 6))),
        bounds=str(rng.choice(BOUNDS)),
        is_relative=bool(relative),
        limit=float(10.0 ** rng.uniform(-3, 1)) if limit else None,
        keep_norm=bool(keep),
        rows=str(rng.choice(["first", "last"])) if rng.random() < parts else "all",
    )


@dataclass(frozen=True)
class Program:
    """A kind of program of the measurement, and how many cases of ten are of it."""

    name: str
    share: int
    kind: str | None = None
    """Of its one operation. Default: one to six operations of any kind."""
    norms: float = 0.5
    parts: float = 0.4
    """As in `random_operation`."""


PROGRAMS = (
    *(Program(kind, 1, kind, norms=0.0, parts=0.0) for kind in KINDS),
    *(Program(f"{kind} with norms, on some rows", 1, kind, norms=1.0, parts=1.0) for kind in KINDS),
    Program("up to 6 of any", 4),
)


def random_case(rng: np.random.Generator, program: Program, width: int) -> CaseShape:
    """A case of this kind of program."""
    kinds = [program.kind] if program.kind else rng.choice(KINDS, size=rng.integers(1, 7))
    return CaseShape(
        width=width,
        seed=int(rng.integers(2**32)),
        magnitudes=tuple(10.0 ** rng.uniform(-3, 3, size=3)),
        operations=tuple(random_operation(rng, str(kind), norms=program.norms, parts=program.parts) for kind in kinds),
    )


def measure(cases: int, widths: Sequence[int]) -> None:
    """Prints, for each backend, dtype and kind of program, the largest error in units of the tolerance.

    Raises AssertionError at the first row that is outside. Interrupted (SIGINT), it prints what it has.
    """
    found: dict[tuple[str, str, str], list[Float64Array]] = defaultdict(list)
    rng = np.random.default_rng(0)
    kinds = [program for program in PROGRAMS for _ in range(program.share)]  # 10 cases
    with suppress(KeyboardInterrupt):
        for index in range(cases):
            program, width = kinds[index % len(kinds)], widths[index // len(kinds) % len(widths)]
            ratios = check_case(random_case(rng, program, width))
            for (backend, dtype), ratio_T in ratios.items():
                found[backend, dtype, program.name].append(ratio_T)
    print("| backend | dtype | program | cases | rows | of them bad | largest error / tolerance |")
    print("|---|---|---|---|---|---|---|")
    for (backend, dtype, name), parts in sorted(found.items()):
        ratio_N = np.concatenate(parts)
        bad, largest = int(np.isnan(ratio_N).sum()), np.nanmax(ratio_N)
        print(f"| {backend} | {dtype} | {name} | {len(parts)} | {len(ratio_N)} | {bad} | {largest:.3f} |")


if __name__ == "__main__":
    measure(cases=CASES if "STEERLLM_TEST_CASES" in os.environ else 10_000, widths=WIDTHS)
