"""The self-test at start: checks on the loaded model that the hooks read and write its residual stream.

Two checks, with short dummy forward passes, in the model's own dtype, compiled or not:

* *Reading.* The final norm of the captured rows after the last layer equals the model's output, except for one factor
  (some models scale their output).
* *Writing.* Each row of a dummy run is a request of its own, so rows do not depend on each other. A program adds the
  difference of two rows after layer L, which turns the first row into the second. The output of the first row must then
  be that of the second. With a wrong LayerOutput, only a part of the residual stream moves, or it is lost. One row
  is moved at the first and the last layer, at some between, and at the first of each class of layers.

The programs are in the engine's bank, because a recorded graph reads no other, and are removed at the end. vLLM's dummy
runs (dummy_run.py) write no keys and values.
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
"""The number of layers after which a row is moved, beside the first of each class."""

READING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.02}
"""Largest distance of a row from the expected one, over the row's norm; allows for rounding in the final norm."""

WRITING_TOLERANCE = {"float32": 0.01, "bfloat16": 0.3, "float16": 0.1}
"""Largest distance of a moved row from its target, over the distance to move; near 1 for a wrong LayerOutput."""

LEAST_DIFFERENCE = 1e-3
"""Smallest distance of two rows, over their norms, at which a moved row differs clearly from one that was not moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedModel:
    """A loaded model with its hooks, on one worker."""

    runner: Any
    """vLLM's model runner."""
    layers: Sequence[int]
    """Layers of this rank, in order; each has a hook."""
    layer_output: LayerOutput
    """What the last of these layers returns."""
    layer_count: int
    """Layers of the whole model."""
    hidden_size: int
    """Hidden size of the residual stream."""
    dtype: str
    """Dtype of the residual stream."""
    bank: ProgramBank
    """The worker's bank: empty before and after the self-test."""
    hooks: Hooks
    """The hooks that run the bank's programs."""


@torch.inference_mode()
def run_self_test(model: HookedModel) -> None:
    """Raises Unsupported (TAP_SELF_TEST_FAILED) unless the hooks read and write the residual stream."""
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
        raise _failed("the residual streams of two inputs are the same after one of the layers, or not finite")
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
        """The residual stream after each layer (zeros unless `capture`) and the model's output, a row for each input.

        `moves`: layer -> vector. Row n is moved by the n-th vector, after the n-th of these layers.
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
        """Within the block, spec n is in slot n of the bank."""
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
        """Runs one dummy step, in which row n is row `start + n` of the trial."""
        count = len(inputs_N)
        rows = [RequestRows("", n, 1, start + n) for n in range(count)]
        plan = build_plan(rows, requests, check_layer=self._model.layers[-1])
        with self._hooked(plan):
            output = run_dummy(self._model.runner, inputs_N)
        missed = plan.unvisited(self._model.layers)
        if missed:
            raise _failed(f"the output of layers {missed} is not {self._model.layer_output}")
        return self._output_of(output)[:count].float().cpu().numpy()

    @contextmanager
    def _hooked(self, plan: StepPlan) -> Iterator[None]:
        """Applies the plan to the forward pass in the block, and collects its results."""
        step = self._model.hooks.begin(plan)
        try:
            yield
        except BaseException:
            step.discard()
            raise
        step.end()
        step.collect()

    def _output_of(self, output: Any) -> torch.Tensor:
        """The model's last hidden states; on an earlier pipeline stage, the residual stream for the next one."""
        if isinstance(output, IntermediateTensors):
            hidden = output["hidden_states"].float()
            is_sum = self._model.layer_output is LayerOutput.HIDDEN_AND_RESIDUAL
            return hidden + output["residual"].float() if is_sum else hidden
        return output[0] if isinstance(output, tuple) else output


def _most_different(streams_ID: npt.NDArray[np.float32]) -> tuple[int, int]:
    """The two inputs whose residual streams differ most; raises Unsupported if all are equal, or not finite."""
    norms_I = np.linalg.norm(streams_ID, axis=-1)
    distances_II = np.linalg.norm(streams_ID[:, None] - streams_ID, axis=-1) / (norms_I[:, None] + norms_I + 1e-30)
    start, aim = np.unravel_index(np.argmax(np.nan_to_num(distances_II, nan=0.0, posinf=0.0)), distances_II.shape)
    if not distances_II[start, aim] > LEAST_DIFFERENCE:
        raise _failed("the residual stream after the last layer is the same for every input, or not finite")
    return int(start), int(aim)


def _layers_to_move(model: HookedModel) -> list[int]:
    """The layers after which a row is moved: the first and the last, some between, and the first of each class."""
    modules = decoder_layers(model.runner.get_model())
    first_of_class = {type(modules[layer]): layer for layer in reversed(model.layers)}
    places = np.linspace(0, len(model.layers) - 1, MOVED).round().astype(int)
    return sorted({*first_of_class.values(), *(model.layers[place] for place in places)})


def _check_reading(
    norm: torch.nn.Module | None, streams_ID: npt.NDArray[Any], outputs_ID: npt.NDArray[np.float32], dtype: str
) -> None:
    if norm is None:  # the output is the residual stream or cannot be compared with it; writing is still tested
        return
    normed = norm(torch.from_numpy(streams_ID.astype(np.float32)).to(getattr(torch, dtype)).to(_device_of(norm)))
    expected_ID = (normed[0] if isinstance(normed, tuple) else normed).float().cpu().numpy()
    factor = float((outputs_ID * expected_ID).sum() / ((expected_ID * expected_ID).sum() + 1e-30))
    error = _largest(outputs_ID - factor * expected_ID, outputs_ID)
    if not error <= READING_TOLERANCE[dtype]:
        raise _failed(
            f"the final norm of the residual stream after the last layer is {error:.2g} off the model's output "
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
            f"a row whose residual stream was replaced by another's after layer {layers[worst]} differs from that "
            f"row's output by {errors_K[worst]:.2g} of their distance (allowed: {WRITING_TOLERANCE[dtype]:g})"
        )


def _largest(distance_ND: npt.NDArray[np.float32], rows_ND: npt.NDArray[np.float32]) -> float:
    """The largest distance in units of its row's norm."""
    return float((np.linalg.norm(distance_ND, axis=-1) / (np.linalg.norm(rows_ND, axis=-1) + 1e-30)).max())


def _device_of(module: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _failed(finding: str) -> Unsupported:
    return Unsupported(
        f"the hooks do not read and write this model's residual stream: {finding}. The output of its layers is "
        "not what engine/worker/layer_outputs.py or steer_allow_unverified states",
        reason="TAP_SELF_TEST_FAILED",
    )
