"""What is wrong with an answer: rows, tokens, receipts and the trace of what the workers did."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np

from steer_service.core.capture import CaptureSite
from steer_service.core.errors import SteerError
from steer_service.core.events import CaptureBlock, CaptureHeld, Completed, Event, OutputFinished, Started, TokenDelta
from steer_service.core.spans import positions_of
from steer_service.core.stored_capture import in_order
from steer_service.engine.worker.trace import TracedRows, TracedStep
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.response_validator import ResponseValidator
from tests.engine.deterministic_model import rules
from tests.engine.deterministic_model.traffic import Case


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came back for a case."""

    case: Case
    """What was asked."""
    events: list[Event] = field(default_factory=list)
    """Everything up to the end, or until the caller went away."""
    error: SteerError | None = None
    """What it failed with, if it did."""

    @property
    def is_complete(self) -> bool:
        """True unless the caller went away."""
        return bool(self.events) and isinstance(self.events[-1], Completed)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens; () if nothing came."""
        return next((event.prompt_token_ids for event in self.events if isinstance(event, Started)), ())

    def outputs(self) -> range:
        """Indices of the outputs."""
        return range(self.case.request.sampling.n or 1)

    def generated(self, index: int) -> list[int]:
        """Tokens of one output."""
        deltas = [event for event in self.events if isinstance(event, TokenDelta) and event.output_index == index]
        return [token for delta in deltas for token in delta.token_ids]

    def rows(self, index: int) -> dict[tuple[int, CaptureSite], np.ndarray]:
        """(layer, site) -> all rows of one output that came, however they came, in the order in which they did."""
        came: dict[tuple[int, CaptureSite], list[np.ndarray]] = defaultdict(list)
        for event in self.events:
            if isinstance(event, CaptureBlock) and event.output_index == index:
                came[event.layer, event.site].append(event.hidden)
            elif isinstance(event, CaptureHeld) and event.output_index == index:
                assert isinstance(event.held, LocalCapture)
                for layer, site, hidden in in_order(event.held.captured):
                    came[layer, site].append(hidden)
        return {key: np.concatenate(parts) for key, parts in came.items()}

    def finished(self, index: int) -> list[OutputFinished]:
        """Ends of one output: one."""
        return [event for event in self.events if isinstance(event, OutputFinished) and event.output_index == index]

    def name(self, index: int) -> str:
        """The trace's name of one output."""
        return f"{self.case.request.request_id}/{index}"


async def answer(model: SteeringCalls, case: Case) -> Answer:
    """Sends a case, and goes away when it says so."""
    answer = Answer(case=case)
    deltas = 0
    try:
        async with aclosing(model.submit(case.request)) as events:
            async for event in events:
                answer.events.append(event)
                deltas += isinstance(event, TokenDelta)
                if isinstance(event, CaptureHeld):
                    await event.held.release()  # what was seen of it stays
                if case.cancel_after is not None and deltas >= case.cancel_after:
                    break
    except SteerError as error:
        answer.error = error
    return answer


def faults_of(answer: Answer) -> Iterator[str]:
    """Every wrong, missing or doubled row, token or receipt of an answer, in words."""
    if answer.error is not None:
        yield f"{answer.name(0)}: failed: {answer.error!r}"
    elif answer.case.cancel_after is None and not answer.is_complete:
        yield f"{answer.name(0)}: incomplete"
    for index in answer.outputs():
        name, tokens = answer.name(index), answer.generated(index)
        sequence = [*answer.prompt, *tokens]
        if not answer.prompt:
            continue  # the caller went away before anything came
        if not tokens:
            if answer.is_complete:
                yield f"{name}: no tokens"
            continue
        want = rules.streams_of(sequence[:-1], answer.case.request.steering, len(answer.prompt))
        yield from _token_faults(name, answer, tokens, want[CaptureSite.AFTER][-1])
        if answer.is_complete:
            yield from _row_faults(name, answer, index, want)
            yield from _end_faults(name, answer, index, len(sequence) - 1)
    if answer.is_complete:
        yield from _contract_faults(answer)


def _contract_faults(answer: Answer) -> Iterator[str]:
    """What every caller of this project compares: receipts, positions and labels."""
    validator = ResponseValidator(answer.case.request)
    try:
        for event in answer.events:
            validator.check(event)
    except SteerError as error:
        yield f"{answer.name(0)}: {error}"


def _token_faults(name: str, answer: Answer, tokens: Sequence[int], last_TD: np.ndarray) -> Iterator[str]:
    sampling = answer.case.request.sampling
    for offset, token in enumerate(tokens):
        choices = rules.choices_after(last_TD[len(answer.prompt) - 1 + offset])
        if token not in (choices[:1] if sampling.temperature == 0.0 else choices):
            yield f"{name}: token {offset} is {token}, not among {choices}"
            return


def _row_faults(name: str, answer: Answer, index: int, want: Mapping[CaptureSite, np.ndarray]) -> Iterator[str]:
    capture = answer.case.request.capture
    rows = answer.rows(index)
    asked: set[tuple[int, CaptureSite]] = set()
    if capture is not None:
        asked = {(layer, site) for layer in capture.layers for site in capture.site.parts}
    if rows.keys() != asked:
        yield f"{name}: captured {set(rows)}, asked {asked}"
    for (layer, site), got_RD in rows.items():
        assert capture is not None
        whole_TD = want[site][layer]
        want_RD = whole_TD[rules.rows_of(capture.positions, len(answer.prompt), len(whole_TD))]
        if got_RD.shape != want_RD.shape:
            yield f"{name}: layer {layer} has shape {got_RD.shape}, not {want_RD.shape}"
        elif got_RD.tobytes() != want_RD.tobytes():
            wrong = np.flatnonzero((got_RD != want_RD).any(axis=1))
            row, first = got_RD[wrong[0]], wrong[0]
            yield (
                f"{name}: layer {layer}: {len(wrong)} wrong rows, the first at {first} says layer "
                f"{row[rules.LAYER]}, position {row[rules.POSITION]}, token {row[rules.TOKEN]}"
            )


def _end_faults(name: str, answer: Answer, index: int, rows: int) -> Iterator[str]:
    request, ends = answer.case.request, answer.finished(index)
    if len(ends) != 1:
        yield f"{name}: ended {len(ends)} times"
        return
    receipt = ends[0].receipt
    prompt = len(answer.prompt)
    captured = len(rules.rows_of(request.capture.positions, prompt, rows)) if request.capture is not None else 0
    steered = len(rules.rows_of(request.steering.positions, prompt, rows)) if request.steering is not None else 0
    got = (receipt.steering_digest, receipt.steered_layers, receipt.rows_captured, receipt.rows_total)
    wanted = (
        request.steering.digest() if request.steering is not None else "",
        tuple(sorted(request.steering.layers)) if request.steering is not None else (),
        captured,
        rows,
    )
    if got != wanted:
        yield f"{name}: receipt {got}, not {wanted}"
    if not steered - receipt.rows_from_prefix_cache <= receipt.rows_steered <= steered:  # exactly: judge_trace
        yield f"{name}: {receipt.rows_steered} of {steered} rows steered, {receipt.rows_from_prefix_cache} reused"


@dataclass(slots=True)
class TraceVerdict:
    """What the workers' trace says about a set of answers."""

    faults: list[str] = field(default_factory=list)
    """Rows on which something else was done than asked, in words."""
    recomputed: int = 0
    """Rows computed again, which happens after preemption only."""
    prefills_together: int = 0
    """Most requests that one step left in the middle of their prompts."""
    workers: set[int] = field(default_factory=set)
    """Workers that ran at least one row of an answer."""


def judge_trace(steps: Sequence[TracedStep], answers: Sequence[Answer], *, tensor_parallel: int = 1) -> TraceVerdict:
    """Compares what was applied to which (output, position, layer) on which worker with what was asked."""
    verdict = TraceVerdict()
    done: dict[str, list[tuple[int, TracedRows]]] = defaultdict(list)
    prompts = {answer.name(index): len(answer.prompt) for answer in answers for index in answer.outputs()}
    for step in steps:
        partial = 0
        for rows in step.done:
            done[rows.output].append((step.worker, rows))
            partial += rows.first_position + rows.row_count < prompts.get(rows.output, 0)
        verdict.workers |= {step.worker} if step.done else set()
        verdict.prefills_together = max(verdict.prefills_together, partial)
    for answer in answers:
        for index in answer.outputs():
            _judge_output(verdict, answer, index, done.pop(answer.name(index), []), tensor_parallel)
    verdict.faults += [f"{name}: nobody asked for it" for name in done]
    return verdict


def _judge_output(
    verdict: TraceVerdict, answer: Answer, index: int, done: Sequence[tuple[int, TracedRows]], tensor_parallel: int
) -> None:
    request, name = answer.case.request, answer.name(index)
    steers = set(request.steering.layers) if request.steering is not None else set()
    captures = set(request.capture.layers) if request.capture is not None else set()
    digest = request.steering.program_digest() if request.steering is not None else ""
    computed: Counter[tuple[int, int]] = Counter()
    steered: dict[tuple[int, int], set[int]] = defaultdict(set)
    captured: dict[tuple[int, int], set[int]] = defaultdict(set)
    for worker, rows in done:
        if rows.digest != digest or not set(rows.steered_layers) <= steers or rows.bad_positions:
            verdict.faults.append(f"{name}: asked for {digest[:8]} at {steers}, got {rows} on worker {worker}")
        for position in range(rows.first_position, rows.first_position + rows.row_count):
            computed[worker, position] += 1
        for position in positions_of(rows.steered).tolist():
            for layer in rows.steered_layers:
                steered[position, layer].add(worker)
        for position in positions_of(rows.captured).tolist():
            for layer in rows.captured_layers:
                captured[position, layer].add(worker)
    verdict.recomputed += sum(count - 1 for count in computed.values())
    if not answer.is_complete or not (steers or captures):
        return
    total = len(answer.prompt) + len(answer.generated(index)) - 1
    in_scope = {
        kind: set(rules.rows_of(asked.positions, len(answer.prompt), total).tolist()) if asked is not None else set()
        for kind, asked in (("steered", request.steering), ("captured", request.capture))
    }
    reused = rows_steered = 0
    for position in range(total):
        if not any(computed[worker, position] for worker, _ in done):
            reused += 1
            continue
        rows_steered += position in in_scope["steered"]
        for layer in steers:
            wanted = tensor_parallel if position in in_scope["steered"] else 0
            if len(steered[position, layer]) != wanted:
                verdict.faults.append(f"{name}: row {position} of layer {layer} steered by {steered[position, layer]}")
        for layer in captures:
            if len(captured[position, layer]) != (position in in_scope["captured"]):
                by = captured[position, layer]
                verdict.faults.append(f"{name}: row {position} of layer {layer} captured by {by}")
    receipt = answer.finished(index)[0].receipt
    if (reused, rows_steered) != (receipt.rows_from_prefix_cache, receipt.rows_steered):
        verdict.faults.append(f"{name}: {reused} rows not computed and {rows_steered} steered, not as in {receipt}")
