"""Compares answers of an engine with what was asked, with float64 row by row, and with a model in float64.

T: rows of a request; D: hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from bench.on_gpu.reference import Perturbation, Reference, TokenSequence
from bench.on_gpu.traffic import Asked
from steer_service.core.positions import PositionRange, PositionScope, scope_from
from steer_service.core.spans import Spans, clipped, mask_of, united
from steer_service.core.specs import LayerSteeringSpec, SteeringOp
from steer_service.ops.truth import truth_of, verdict_on
from steer_service.runtime.results import Generation, Output

UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""The relative error of rounding a number once to the dtype."""
FACTORS, FLOOR = {"float32": 64.0, "bfloat16": 16.0}, 8.0
"""A captured row is at most factor * sensitivity + FLOOR * unit from float64; see docs/numerics.md."""
DRAWS = 8
"""Perturbations of which the sensitivity of a row is the largest effect."""
CLOSE = 0.5
"""Requests with an error above this part of its bound get all draws, others only as many as they need."""

ByLayer = Mapping[int, npt.NDArray[np.float64]]
"""Layer -> a number for each row."""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What was found out about an engine; filled in as it becomes known."""

    start_s: float = 0.0
    """Seconds to start the engine, with its proof."""
    proof: str = ""
    """What it proved, as `steer serve` prints it."""
    proof_s: float = 0.0
    """Seconds of the start that the proof took."""
    requests: int = 0
    """Requests that were answered or failed."""
    failures: list[str] = field(default_factory=list)
    """A line for each request that failed or whose answer was wrong."""
    steered_rows: int = 0
    """Rows after steered layers that were compared with float64."""
    steered_worst: float = 0.0
    """Their largest error in units of the tolerance."""
    steered_requests: int = 0
    """Requests with steering whose rows were compared."""
    told_apart: int = 0
    """Those of them whose rows would be outside of the tolerance without their steering."""
    model_rows: int = 0
    """Captured rows that were compared with a model in float64; 0 before that comparison has ended."""
    model_median: float = 0.0
    """Their median error in units of the row's norm."""
    model_worst: float = 0.0
    """Their largest error in units of its bound; at most CLOSE where that is known of all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A request and what came back."""

    number: int
    asked: Asked
    generation: Generation

    @property
    def output(self) -> Output:
        """Its only output."""
        return self.generation.outputs[0]

    @property
    def fed(self) -> tuple[int, ...]:
        """Tokens that were fed to the model: all but the last one."""
        return (*self.asked.prompt, *self.output.token_ids[:-1])

    @property
    def operations(self) -> dict[int, tuple[SteeringOp, ...]]:
        """Steered layer -> its operations, with positions as numbers, or None for all."""
        steering = self.asked.request.steering
        return {layer: self._resolved(spec) for layer, spec in (steering.layers if steering else {}).items()}

    def _resolved(self, spec: LayerSteeringSpec) -> tuple[SteeringOp, ...]:
        return tuple(replace(operation, positions=self._numbers(operation)) for operation in spec.operations)

    def _numbers(self, operation: SteeringOp) -> PositionScope | None:
        steering, rows = self.asked.request.steering, len(self.fed)
        scope = operation.positions or (steering.positions if steering is not None else None)
        if scope is None:
            return None
        spans = clipped(scope.resolve(len(self.asked.prompt), rows), rows)
        return scope_from([PositionRange(first, end - 1) for first, end in spans])

    def __str__(self) -> str:
        return f"request {self.number} ({self.asked.kind})"


def check(answers: Sequence[Answer], dtype: str, findings: Findings) -> list[Answer]:
    """Checks receipts and steered rows, and adds what it finds; returns the answers whose receipts are right."""
    complete = []
    for answer in answers:
        finding = check_receipt(answer)
        if not finding:
            complete.append(answer)
            finding = check_steered(answer, dtype, findings)
        if finding:
            findings.failures.append(f"{answer}: {finding}")
    return complete


def check_receipt(answer: Answer) -> str:
    """What is wrong with the receipt; "" if nothing is."""
    request, receipt, rows = answer.asked.request, answer.output.receipt, len(answer.fed)
    assert request.capture is not None
    operations = [operation for layer in answer.operations.values() for operation in layer]
    expected = {
        "steering_digest": request.steering.digest() if request.steering is not None else "",
        "steered_layers": tuple(answer.operations),
        "rows_steered": int(_acts_on(operations, rows).sum()),
        "captured_layers": request.capture.layers,
        "rows_captured": rows,
        "rows_total": rows,
    }
    for name, value in expected.items():
        if getattr(receipt, name) != value:
            return f"the receipt has {name} {getattr(receipt, name)}, expected {value}"
    return ""


def check_steered(answer: Answer, dtype: str, findings: Findings) -> str:
    """What is wrong with the rows after each layer, given those before; "" if nothing is.

    `dtype` is the model's. Adds to the counts in `findings`.
    """
    steered, captured = answer.operations, answer.output.captured
    is_told_apart = False
    for layer, after_TD in captured.after.items():
        before_TD, operations = captured.before[layer], steered.get(layer, ())
        acts_T = _acts_on(operations, len(after_TD))
        if not np.array_equal(before_TD[~acts_T].view(np.int32), after_TD[~acts_T].view(np.int32)):
            return f"after layer {layer}, rows that are not steered there have other bits than before it"
        if not operations:
            continue
        wide_TD, got_TD, is_bad_T = before_TD.astype(float), after_TD.astype(float), np.zeros(len(acts_T), np.bool_)
        verdict = verdict_on(dtype, got_TD, is_bad_T, truth_of(wide_TD, operations))
        findings.steered_rows += int(acts_T.sum())
        findings.steered_worst = max(findings.steered_worst, float(verdict.ratio_T.max()))
        if verdict.finding:
            return f"after layer {layer}: {verdict.finding}"
        is_told_apart |= bool(verdict_on(dtype, got_TD, is_bad_T, truth_of(wide_TD, ())).finding)
    findings.steered_requests += bool(steered)
    findings.told_apart += is_told_apart
    if steered and not is_told_apart:
        return "without its steering the rows would be within the tolerance, too"
    return ""


def compare_with_model(reference: Reference, answers: Sequence[Answer], dtype: str, findings: Findings) -> None:
    """Compares each captured row with the model in float64; rows outside of their bounds are failures.

    The sensitivity of a row is the largest of DRAWS effects, and grows with each of them. So the draws of a request end
    when no error is above CLOSE of its bound.
    """
    asked = [_sequence_of(answer) for answer in answers]
    exact = reference.streams(asked)
    errors = [
        {layer: relative_errors(rows, truth[layer]) for layer, rows in answer.output.captured.after.items()}
        for answer, truth in zip(answers, exact, strict=True)
    ]
    sensitivities = [{layer: np.zeros(len(error_T)) for layer, error_T in one.items()} for one in errors]
    waiting = list(range(len(answers)))
    for draw in range(DRAWS):
        perturbation = Perturbation(unit=UNITS[dtype], is_alike=draw % 2 == 1, seed=draw // 2)
        moved = reference.streams([asked[index] for index in waiting], perturbation)
        for index, streams in zip(waiting, moved, strict=True):
            for layer, truth_TD in exact[index].items():
                known_T = sensitivities[index][layer]
                np.maximum(known_T, relative_errors(streams[layer], truth_TD), out=known_T)
        waiting = [index for index in waiting if _worst(errors[index], sensitivities[index], dtype) > CLOSE]
        if not waiting:
            break
    worst = [_worst(*pair, dtype) for pair in zip(errors, sensitivities, strict=True)]
    findings.failures += [
        f"{answer}: a captured row is {ratio:.2f} of its bound from float64"
        for answer, ratio in zip(answers, worst, strict=True)
        if not ratio <= 1.0
    ]
    errors_N = np.concatenate([error_T for one in errors for error_T in one.values()])
    findings.model_rows, findings.model_median = len(errors_N), float(np.median(errors_N))
    findings.model_worst = float(np.max(worst))


def relative_errors(got_TD: npt.NDArray[np.floating], want_TD: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distance of each row from its truth, in units of that row's norm."""
    distance_T = np.linalg.norm(got_TD.astype(np.float64) - want_TD, axis=-1)
    return distance_T / np.linalg.norm(want_TD, axis=-1)


def _worst(errors: ByLayer, sensitivities: ByLayer, dtype: str) -> float:
    """The largest error of any row in units of its bound."""
    factor, least = FACTORS[dtype], FLOOR * UNITS[dtype]
    ratios = [(error_T / (factor * sensitivities[layer] + least)).max() for layer, error_T in errors.items()]
    return float(np.max(ratios))  # NaN if one of them is


def _acts_on(operations: Sequence[SteeringOp], rows: int) -> npt.NDArray[np.bool_]:
    """On which of the rows any of these operations acts, whose positions are numbers."""
    return mask_of(united(span for operation in operations for span in _spans(operation, rows)), rows)


def _spans(operation: SteeringOp, rows: int) -> Spans:
    return ((0, rows),) if operation.positions is None else operation.positions.resolve_within(rows, rows)


def _sequence_of(answer: Answer) -> TokenSequence:
    return TokenSequence(
        token_ids=answer.fed,
        prompt_tokens=len(answer.asked.prompt),
        steering=answer.asked.request.steering,
        layers=tuple(answer.output.captured.after),
    )
