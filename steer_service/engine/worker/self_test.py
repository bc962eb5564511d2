"""The self-test at start: the loaded model itself says whether the hooks read and write its residual stream.

Two proofs, by short dummy forward passes, in the model's own dtype, compiled or not:

* *Reading.* The final norm of what the hook saw after the last layer is what the model puts out, but for one factor
  (some models scale their output).
* *Writing.* Without attention the rows of a step know nothing of each other. So a row whose stream is replaced after
  layer L by another row's, by a program that adds the difference, must come out as that other row: a wrong convention
  moves only a part of the stream, or wipes it. One row for the first and the last layer, some between, and the first
  of each class of layers.

Its programs stand in the engine's bank, as a recorded graph reads no other, and are gone when it is over; vLLM's dummy
runs (dummy.py) write no keys and values.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.sequence import IntermediateTensors

from steer_service.core.arrays import dtype_from_name
from steer_service.core.errors import Unsupported
from steer_service.core.specs import SteeringSpec
from steer_service.engine.slots import ProgramLoad
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.dummy_run import INPUTS, run_dummy
from steer_service.engine.worker.hooks import Hooks
from steer_service.engine.worker.layer_outputs import LayerOutput, decoder_layers, final_norm
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.program import compile_program, program_to_bytes

MOVED = 6
"""Layers after which a row is moved, beside the first of each class."""

READING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.02}
"""Largest distance of a row from what it should be, over the row's norm: rounding of a whole model's last norm."""

WRITING_TOLERANCE = {"float32": 0.01, "bfloat16": 0.3, "float16": 0.1}
"""Largest distance of a moved row from its aim, over the distance from where it was; a wrong layer_output is near 1."""

LEAST_DIFFERENCE = 1e-3
"""Two streams nearer than this, over their norm, could not tell a moved row from one that was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedModel:
    """A loaded model with its hooks, as one worker holds it."""

    runner: Any
    """vLLM's model runner."""
    layers: Sequence[int]
    """Layers with a hook on this rank, in order."""
    layer_output: LayerOutput
    """What the last of them returns."""
    layer_count: int
    """Layers of the whole model."""
    hidden_size: int
    """Width of the stream."""
    dtype: str
    """Element type of the stream."""
    bank: ProgramBank
    """Its programs: none yet, and none when the test is over."""
    hooks: Hooks
    """What runs them."""


@torch.inference_mode()
def run_self_test(model: HookedModel) -> None:
    """Raises Unsupported (TAP_SELF_TEST_FAILED) unless the hooks read and write the stream of the loaded model."""
    trial = _Trial(model)
    streams_LID, plain_ID = trial.run(np.arange(INPUTS), capture=True)
    last_ID = streams_LID[model.layers[-1]]
    if get_pp_group().is_last_rank:
        _check_reading(final_norm(model.runner.get_model()), last_ID, plain_ID, model.dtype)
    start, aim = _most_different(last_ID.astype(np.float32))
    layers = _layers_to_move(model)
    streams_KID = streams_LID[layers].astype(np.float32)
    moves_KD = streams_KID[:, aim] - streams_KID[:, start]
    if not (np.isfinite(moves_KD).all() and moves_KD.any(axis=-1).all()):
        raise _failed("the streams of two inputs are the same after one of the layers, or not finite")
    _, moved_KD = trial.run(np.full(len(layers), start), moves=dict(zip(layers, moves_KD, strict=True)))
    _check_writing(layers, moved_KD, plain_ID[start], plain_ID[aim], model.dtype)


class _Trial:
    """Runs rows of known input through the hooked model. L: layers; I: inputs; K: moved rows; D: hidden size."""

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        runner, bank = model.runner, model.bank
        places = min(bank.op_counts_LS.shape[1], len(bank.directions_WD))
        self._rows_at_once = min(runner.max_num_tokens, runner.scheduler_config.max_num_seqs, places)

    def run(
        self,
        inputs_N: npt.NDArray[Any],
        *,
        capture: bool = False,
        moves: Mapping[int, npt.NDArray[np.float32]] | None = None,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """The streams after each layer (zeros unless `capture`) and the model's output, of one row for each input.

        With `moves` (layer -> vector), the first row is moved after the first of these layers, and so on.
        """
        rows = len(inputs_N)
        streams_LND = np.zeros(
            (self._model.layer_count, rows, self._model.hidden_size), dtype_from_name(self._model.dtype)
        )
        specs = [SteeringSpec.simple_add(layer, move_D) for layer, move_D in (moves or {}).items()]
        outputs = []
        for start in range(0, rows, self._rows_at_once):
            part = slice(start, start + self._rows_at_once)
            with self._loaded(specs[part]):
                requests = [
                    self._request(streams_LND if capture else None, n if n < len(specs[part]) else None)
                    for n in range(len(inputs_N[part]))
                ]
                outputs.append(self._forward(inputs_N[part], start, requests))
        return streams_LND, np.concatenate(outputs)

    @contextmanager
    def _loaded(self, specs: Sequence[SteeringSpec]) -> Iterator[None]:
        """Within the block, spec n stands in slot n of the bank."""
        for slot, spec in enumerate(specs):
            program = compile_program(spec)
            self._load(ProgramLoad(slot=slot, digest=program.digest, data=program_to_bytes(program)))
        try:
            yield
        finally:
            bank = self._model.bank
            bank.directions_WD[bank.op_rows_LSK[:, : len(specs), 0]] = 0.0
            for slot in range(len(specs)):
                self._load(ProgramLoad(slot=slot, digest="", data=b""))

    def _load(self, load: ProgramLoad) -> None:
        self._model.bank.load(load)
        self._model.hooks.sync_slot(load.slot)

    def _request(self, streams_LND: npt.NDArray[Any] | None, slot: int | None) -> PlannedRequest:
        after_L = np.zeros(self._model.layer_count, np.int64)
        if streams_LND is not None:
            after_L[list(self._model.layers)] = [streams_LND[layer].ctypes.data for layer in self._model.layers]
        steers_L = np.zeros(self._model.layer_count, bool)
        if slot is not None:
            steers_L = self._model.bank.op_counts_LS[:, slot] > 0
        return PlannedRequest(
            slot=NO_SLOT if slot is None else slot,
            steers_L=steers_L,
            before_L=np.zeros(self._model.layer_count, np.int64),
            after_L=after_L,
            row_limit=np.iinfo(np.int32).max,
        )

    def _forward(
        self, inputs_N: npt.NDArray[Any], start: int, requests: Sequence[PlannedRequest]
    ) -> npt.NDArray[np.float32]:
        """One dummy run; row n of the step is the row `start + n` of the trial."""
        count = len(inputs_N)
        rows = [RequestRows("", n, 1, start + n) for n in range(count)]
        plan = build_plan(rows, requests, check_layer=self._model.layers[-1])
        with self._hooked(plan):
            output = run_dummy(self._model.runner, inputs_N)
        missed = plan.unvisited(self._model.layers)
        if missed:
            raise _failed(f"layers {missed} do not return what was expected of them ({self._model.layer_output})")
        return self._output_of(output)[:count].float().cpu().numpy()

    @contextmanager
    def _hooked(self, plan: StepPlan) -> Iterator[None]:
        """Has the forward pass in the block do the plan, and waits for what was done."""
        step = self._model.hooks.begin(plan)
        try:
            yield
        except BaseException:
            step.discard()
            raise
        step.end()
        step.collect()

    def _output_of(self, output: Any) -> torch.Tensor:
        """The model's last hidden states; on an earlier pipeline stage, the stream that it hands on."""
        if isinstance(output, IntermediateTensors):
            hidden = output["hidden_states"].float()
            is_sum = self._model.layer_output is LayerOutput.HIDDEN_AND_RESIDUAL
            return hidden + output["residual"].float() if is_sum else hidden
        return output[0] if isinstance(output, tuple) else output


def _most_different(streams_ID: npt.NDArray[np.float32]) -> tuple[int, int]:
    """The two inputs whose streams differ most; raises Unsupported if all are alike, or not finite."""
    norms_I = np.linalg.norm(streams_ID, axis=-1)
    distances_II = np.linalg.norm(streams_ID[:, None] - streams_ID, axis=-1) / (norms_I[:, None] + norms_I + 1e-30)
    start, aim = np.unravel_index(np.argmax(np.nan_to_num(distances_II, nan=0.0, posinf=0.0)), distances_II.shape)
    if not distances_II[start, aim] > LEAST_DIFFERENCE:
        raise _failed("the stream after the last layer is the same for every input, or not finite")
    return int(start), int(aim)


def _layers_to_move(model: HookedModel) -> list[int]:
    """Layers of this rank, in order: the first and the last, some between, and the first of each class."""
    modules = decoder_layers(model.runner.get_model())
    first_of_class = {type(modules[layer]): layer for layer in reversed(model.layers)}
    places = np.linspace(0, len(model.layers) - 1, MOVED).round().astype(int)
    return sorted({*first_of_class.values(), *(model.layers[place] for place in places)})


def _check_reading(
    norm: torch.nn.Module | None, streams_ID: npt.NDArray[Any], outputs_ID: npt.NDArray[np.float32], dtype: str
) -> None:
    if norm is None:  # the output is the stream, or cannot be compared with it; writing is tested all the same
        return
    normed = norm(torch.from_numpy(streams_ID.astype(np.float32)).to(getattr(torch, dtype)).to(_device_of(norm)))
    expected_ID = (normed[0] if isinstance(normed, tuple) else normed).float().cpu().numpy()
    factor = float((outputs_ID * expected_ID).sum() / ((expected_ID * expected_ID).sum() + 1e-30))
    error = _largest(outputs_ID - factor * expected_ID, outputs_ID)
    if not error <= READING_TOLERANCE[dtype]:
        raise _failed(
            f"the final norm of the stream read after the last layer is off the model's output by {error:.2g} "
            f"(allowed: {READING_TOLERANCE[dtype]:g})"
        )


def _check_writing(
    layers: Sequence[int],
    moved_KD: npt.NDArray[np.float32],
    start_D: npt.NDArray[np.float32],
    aim_D: npt.NDArray[np.float32],
    dtype: str,
) -> None:
    errors_K = np.linalg.norm(moved_KD - aim_D, axis=-1) / np.linalg.norm(start_D - aim_D)
    worst = int(np.argmax(np.nan_to_num(errors_K, nan=np.inf)))
    if not errors_K[worst] <= WRITING_TOLERANCE[dtype]:
        raise _failed(
            f"a row whose stream was replaced by another's after layer {layers[worst]} came out "
            f"{errors_K[worst]:.2g} of the way off that other (allowed: {WRITING_TOLERANCE[dtype]:g})"
        )


def _largest(distance_ND: npt.NDArray[np.float32], rows_ND: npt.NDArray[np.float32]) -> float:
    """The largest distance in units of its row's norm."""
    return float((np.linalg.norm(distance_ND, axis=-1) / (np.linalg.norm(rows_ND, axis=-1) + 1e-30)).max())


def _device_of(module: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _failed(finding: str) -> Unsupported:
    return Unsupported(
        f"the hooks do not read and write this model's residual stream: {finding}. Its layers do not return what "
        "engine/worker/layer_outputs.py, or steer_allow_unverified, says",
        reason="TAP_SELF_TEST_FAILED",
    )
