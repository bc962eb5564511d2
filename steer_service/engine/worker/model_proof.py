"""The proof of the loaded model: the hooks read and write its residual stream, in each class of steps.

Dummy runs (dummy_run.py) compute a few rows of known input, each a request of its own, so that rows do not depend on
each other. In each class:

* *Reading.* The streams after all layers are those of the first class, and the final norm of the last one equals the
  model's output, except for one factor (some models scale their output).
* *Writing.* A program adds the difference of two inputs' streams after layer L, which turns the first into the second.
  The output must then be that of the second. With a wrong LayerOutput only a part of the stream moves, or it is lost.
* *Neighbours.* Rows without a program have the same bits with and without steered neighbours.
* *Order.* Three passes, between which slots get other programs, do each what it was told, though none is collected
  before the last has been queued.
* *Emptying.* A pass after them, without a plan, has the same bits as one before.

Where the model itself does not compute equal rows to equal bits, rows are compared as those of two classes are.

Relies on (vLLM 0.24 to 0.33): `get_pp_group`; `IntermediateTensors`, which a stage passes on.
tests/engine/test_seams.py and the tests with two stages notice a change.

L: layers; I: inputs; N: tested rows; T: rows of a dummy run; K: moved rows; D: hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.sequence import IntermediateTensors

from steer_service.core.arrays import dtype_from_name
from steer_service.core.specs import SteeringSpec
from steer_service.engine.worker.dispatch import UNGRAPHED, DispatchClass, DummyShape, first_rows, watched_dispatch
from steer_service.engine.worker.dummy_run import INPUTS, PROOF_ROWS, run_dummy
from steer_service.engine.worker.hooks import HookContext, Hooks, use_step
from steer_service.engine.worker.layer_outputs import LayerOutput, decoder_layers, final_norm
from steer_service.engine.worker.proof_checks import (
    CountedVisits,
    ModelFault,
    PassChecks,
    ProofPass,
    Reference,
    has_same_bits,
    hash_of,
    most_different,
)
from steer_service.engine.worker.proof_programs import ProofPrograms
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, build_plan

MOVED = 6
"""The number of layers after which a row is moved, beside the first of each class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedModel:
    """A loaded model with its hooks, on one worker."""

    runner: Any
    """vLLM's model runner."""
    layer_output: LayerOutput
    """What the last of its layers returns."""
    context: HookContext
    """The layers, their sizes, and the bank: empty before and after the proof."""
    hooks: Hooks
    """The hooks that run the bank's programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeProof:
    """What came of the dummy runs of one shape."""

    ran_as: DispatchClass
    """How vLLM ran them."""
    is_exact: bool
    """Rows were compared bit by bit."""
    fault: ModelFault | None
    """What is wrong."""
    streams: list[tuple[str, str]]
    """Name and hash of the stream after each layer of this rank."""


class ModelProof:
    """Proves one model, shape by shape. No method raises before its last pass: other ranks would wait in theirs."""

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._context = model.context

    def read(self, shape: DummyShape) -> Reference:
        """The streams of all inputs; raises ModelFault if they do not differ."""
        rows = self._tested_rows(shape)
        streams_LID = np.zeros((self._context.layer_count, INPUTS, self._context.hidden_size), np.float32)
        missed: list[int] = []
        for first in range(0, INPUTS, len(rows)):
            chosen = list(range(first, min(first + len(rows), INPUTS)))
            done = self._run(shape, self._inputs(shape, rows, chosen), rows[: len(chosen)], [NO_SLOT] * len(chosen))
            done.forward.collect()
            missed = missed or done.forward.plan.unvisited(self._context.layers)
            streams_LID[:, chosen] = done.streams_LND
        if missed:
            raise ModelFault(f"the output of layers {missed} is not {self._model.layer_output}")
        start, aim = most_different(streams_LID[self._context.layers[-1]])
        reference = Reference(streams_LID=streams_LID, start=start, aim=aim, layers=self._layers_to_move())
        for layer in reference.layers:
            move_D = reference.move(layer)
            if not (np.isfinite(move_D).all() and move_D.any()):
                raise ModelFault(f"the streams of two inputs are the same after layer {layer}, or not finite")
        return reference

    def prove(self, shape: DummyShape, reference: Reference, first: int = 0) -> ShapeProof:
        """Moves a row at as many layers as fit, from `reference.layers[first]` on; see `moved_at_once`."""
        rows = self._tested_rows(shape)
        count = self.moved_at_once(shape, reference)
        kept = [*range(min(INPUTS, len(rows) - count))]
        rows = rows[: len(kept) + count]
        layers, later = (
            [reference.layers[(first + shift + number) % len(reference.layers)] for number in range(count)]
            for shift in (0, 1)
        )
        inputs_T = self._inputs(shape, rows, [*kept, *[reference.start] * count])
        moved_T = self._inputs(shape, rows, [*kept, *[reference.aim] * count])
        slots = [*[NO_SLOT] * len(kept), *range(count)]
        with (
            watched_dispatch(self._model.runner, shape) as seen,
            ProofPrograms(self._context, self._model.hooks) as programs,
        ):
            idle_TD, again_TD = self._idle(shape, inputs_T), self._idle(shape, inputs_T)
            aim_TD = self._idle(shape, moved_T)
            passes = [self._run(shape, inputs_T, rows, [NO_SLOT] * len(rows))]
            for moved_layers in (layers, later):
                for slot, layer in enumerate(moved_layers):
                    programs.load(slot, SteeringSpec.simple_add(layer, reference.move(layer)))
                passes.append(self._run(shape, inputs_T, rows, slots))
            after_TD = self._idle(shape, inputs_T)
            if not seen or seen[-1].mode == UNGRAPHED:  # hooks are called, as in a step that is staged layer by layer
                passes.append(self._run(shape, inputs_T, rows, slots, by_layer=True))
            for done in passes:
                done.forward.collect()
        ran_as = seen[-1] if seen else DispatchClass(UNGRAPHED, shape.rows)
        if passes[0].calls.count:
            ran_as = DispatchClass(UNGRAPHED, ran_as.rows)  # whatever vLLM has meant to run
        checks = PassChecks(
            context=self._context,
            reference=reference,
            rows=rows,
            kept=kept,
            idle_TD=idle_TD,
            aim_TD=aim_TD,
            is_steady=has_same_bits(idle_TD, again_TD),
        )
        fault = None
        try:
            checks.check_passes(passes)
            checks.check_emptied(after_TD)
            read, first_moved, *moved_later = passes
            checks.check_reading(read)
            checks.check_final_norm(read, self._final_norm())
            checks.check_moved(first_moved, layers, read)
            for done in moved_later:
                checks.check_moved(done, later, read)
        except ModelFault as found:
            fault = type(found)(f"{ran_as}: {found}")
        return ShapeProof(
            ran_as=ran_as,
            is_exact=checks.is_exact,
            fault=fault,
            streams=[
                (f"the residual stream after layer {layer}, {ran_as},", hash_of(passes[0].streams_LND[layer]))
                for layer in self._context.layers
            ],
        )

    def moved_at_once(self, shape: DummyShape, reference: Reference) -> int:
        """How many rows one pass of this shape moves, each after another layer."""
        bank = self._context.bank
        free = max(1, len(self._tested_rows(shape)) - INPUTS)
        return min(free, len(reference.layers), bank.op_counts_LS.shape[1], len(bank.directions_WD))

    def _tested_rows(self, shape: DummyShape) -> list[int]:
        """Rows that begin a request, from the first to the last of them."""
        rows = first_rows(self._model.runner, shape)
        count = min(len(rows), self._context.requests, PROOF_ROWS)
        return [rows[place] for place in np.linspace(0, len(rows) - 1, count).round().astype(int)]

    def _inputs(self, shape: DummyShape, rows: Sequence[int], chosen: Sequence[int]) -> npt.NDArray[np.int64]:
        """The input of each row: tested rows have the chosen ones, all others the first."""
        inputs_T = np.zeros(shape.rows, np.int64)
        inputs_T[rows[: len(chosen)]] = chosen
        return inputs_T

    def _idle(self, shape: DummyShape, inputs_T: npt.NDArray[np.int64]) -> torch.Tensor:
        """The output of a dummy run without a plan."""
        return self._output_of(run_dummy(self._model.runner, inputs_T, shape), shape.rows)

    def _run(
        self,
        shape: DummyShape,
        inputs_T: npt.NDArray[np.int64],
        rows: Sequence[int],
        slots: Sequence[int],
        *,
        by_layer: bool = False,
    ) -> ProofPass:
        """A dummy run in which the tested rows are captured, and steered by their slots. It is not collected."""
        context = self._context
        streams_LND = np.zeros((context.layer_count, len(rows), context.hidden_size), dtype_from_name(context.dtype))
        plan = build_plan(
            [RequestRows("", row, 1, number) for number, row in enumerate(rows)],
            [self._request(streams_LND, slot) for slot in slots],
            check_layer=context.layers[-1],
        )
        forward = self._model.hooks.begin(plan, by_layer=by_layer)
        calls = CountedVisits(forward)
        use_step(calls)
        try:
            output = run_dummy(self._model.runner, inputs_T, shape)
        except BaseException:
            forward.discard()
            raise
        forward.end()
        return ProofPass(
            forward=forward, output_TD=self._output_of(output, shape.rows), streams_LND=streams_LND, calls=calls
        )

    def _request(self, streams_LND: npt.NDArray[Any], slot: int) -> PlannedRequest:
        context = self._context
        after_L = np.zeros(context.layer_count, np.int64)
        after_L[list(context.layers)] = [streams_LND[layer].ctypes.data for layer in context.layers]
        steers_L = np.zeros(context.layer_count, bool)
        if slot != NO_SLOT:
            steers_L = context.bank.op_counts_LS[:, slot] > 0
        return PlannedRequest(
            slot=slot,
            steers_L=steers_L,
            before_L=np.zeros(context.layer_count, np.int64),
            after_L=after_L,
            row_limit=np.iinfo(np.int32).max,
        )

    def _output_of(self, output: Any, rows: int) -> torch.Tensor:
        """A copy of the last hidden states; on an earlier pipeline stage, of the stream for the next one.

        Without padding, whose rows may hold anything.
        """
        if isinstance(output, IntermediateTensors):
            hidden_TD: torch.Tensor = output["hidden_states"][:rows]
            is_sum = self._model.layer_output is LayerOutput.HIDDEN_AND_RESIDUAL
            return hidden_TD.float() + output["residual"][:rows].float() if is_sum else hidden_TD.clone()
        found_TD: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found_TD[:rows].clone()

    def _layers_to_move(self) -> list[int]:
        """The layers after which a row is moved: the first and the last, some between, and the first of each class."""
        modules, layers = decoder_layers(self._model.runner.get_model()), self._context.layers
        first_of_class = {type(modules[layer]): layer for layer in reversed(layers)}
        places = np.linspace(0, len(layers) - 1, MOVED).round().astype(int)
        return sorted({*first_of_class.values(), *(layers[place] for place in places)})

    def _final_norm(self) -> torch.nn.Module | None:
        return final_norm(self._model.runner.get_model()) if get_pp_group().is_last_rank else None
