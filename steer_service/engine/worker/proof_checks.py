"""What must be true of the passes of the proof of a model; see model_proof.py.

L: layers; I: inputs; N: tested rows; T: rows of a dummy run; D: hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steer_service.engine.worker.hooks import HookContext, HookedForward

READING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.02}
"""Largest distance of a row from the expected one, over the row's norm; allows for rounding in the final norm."""

CARRIED = 2.0
"""A layer makes the distance of two rows larger by this factor at most: the rounding of earlier layers comes on top."""

MOST_CARRIED = 0.5
"""Largest distance over the row's norm with it; about 1 for a wrong LayerOutput, row or step."""

WRITING_TOLERANCE = {"float32": 0.01, "bfloat16": 0.3, "float16": 0.1}
"""Largest distance of a moved row from its target, over the distance to move; near 1 for a wrong LayerOutput."""

LEAST_DIFFERENCE = 1e-3
"""Smallest distance of two rows, over their norms, at which a moved row differs clearly from one that was not moved."""


class ModelFault(Exception):
    """Something that the hooks do not do right in this model; the text says what."""


class StepFault(ModelFault):
    """Hooks that act in the wrong step or on the wrong row, or not at all, though they fit the model."""


@dataclass(slots=True, eq=False)
class CountedVisits:
    """Stands for a forward pass, and counts the calls of its hooks."""

    forward: HookedForward
    """The forward pass."""
    count: int = 0
    """Calls so far."""

    @property
    def wanted_L(self) -> npt.NDArray[np.bool_]:
        """As the forward pass has it."""
        return self.forward.wanted_L

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Counts the call and passes it on."""
        self.count += 1
        self.forward.visit(hidden_TD, residual_TD, layer)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What the model computes for each input, steered nowhere, and how one input's stream is moved to another's."""

    streams_LID: npt.NDArray[np.float32]
    """The streams after each layer of this rank; zeros for other layers."""
    start: int
    """The input whose rows are moved."""
    aim: int
    """The input whose rows they become."""
    layers: Sequence[int]
    """Layers after which a row is moved: the first and the last, some between, and the first of each class."""

    def move(self, layer: int) -> npt.NDArray[np.float32]:
        """The vector that moves the stream after a layer, shape [D]."""
        return self.streams_LID[layer, self.aim] - self.streams_LID[layer, self.start]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProofPass:
    """One forward pass with a plan, collected or not."""

    forward: HookedForward
    """The forward pass."""
    output_TD: torch.Tensor
    """The model's output, on its device."""
    streams_LND: npt.NDArray[Any]
    """Captured streams of the tested rows, once the pass has been collected."""
    calls: CountedVisits
    """How often a hook was called: never where a graph was replayed."""

    def stream(self, layer: int) -> npt.NDArray[np.float32]:
        """The captured streams after one layer in float32, shape [N, D]."""
        return self.streams_LND[layer].astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PassChecks:
    """The checks of the passes of one shape; each raises ModelFault."""

    context: HookContext
    reference: Reference
    rows: Sequence[int]
    """The tested rows: those that are kept, then those that are moved."""
    kept: Sequence[int]
    """The inputs of the rows that are kept."""
    idle_TD: torch.Tensor
    """The output without a plan."""
    aim_TD: torch.Tensor
    """The same, where the moved rows have the input to which they are moved."""
    is_steady: bool
    """Two runs without a plan had the same bits."""

    @property
    def is_exact(self) -> bool:
        """The model computes a row to the same bits, whatever other rows have."""
        return self.is_steady and has_same_bits(self._others(self.idle_TD), self._others(self.aim_TD))

    @property
    def moved(self) -> Sequence[int]:
        """Rows that are moved."""
        return self.rows[len(self.kept) :]

    def check_passes(self, passes: Sequence[ProofPass]) -> None:
        """Each pass has visited all layers, and has found no row bad."""
        for done in passes:
            missed = done.forward.plan.unvisited(self.context.layers)
            if missed:
                raise StepFault(f"the hooks of layers {missed} did not run")
            if done.forward.plan.bad_N.any():
                raise StepFault("a row that is good was called bad")

    def check_emptied(self, after_TD: torch.Tensor) -> None:
        """Nothing of the passes is left."""
        self._check_same(
            after_TD, self.idle_TD, "a pass without a plan, after others, changes the output", self.is_steady
        )

    def check_reading(self, read: ProofPass) -> None:
        """Captures change nothing, and are the streams of the reference, each of its own row."""
        self._check_same(read.output_TD, self.idle_TD, "a capture changes the output", self.is_steady)
        tolerance = READING_TOLERANCE[self.context.dtype]
        inputs = [*self.kept, *[self.reference.start] * len(self.moved)]
        before_N = np.zeros(len(inputs))  # distances after the previous layer
        for layer in self.context.layers:
            want_ND = self.reference.streams_LID[layer, inputs]
            norm_N = np.linalg.norm(want_ND, axis=-1) + 1e-30
            distance_N = np.nan_to_num(np.linalg.norm(read.stream(layer) - want_ND, axis=-1), nan=np.inf)
            allowed_N = np.clip(tolerance + CARRIED * before_N / norm_N, None, max(tolerance, MOST_CARRIED))
            error_N = distance_N / norm_N
            worst = int((error_N - allowed_N).argmax())
            if not error_N[worst] <= allowed_N[worst]:
                raise ModelFault(
                    f"a row's stream after layer {layer} is {error_N[worst]:.2g} of its norm off what another class "
                    f"captured for the same input (allowed: {allowed_N[worst]:.2g})"
                )
            before_N = distance_N

    def check_final_norm(self, read: ProofPass, norm: torch.nn.Module | None) -> None:
        """The stream after the last layer is what the final norm takes; without one there is nothing to compare."""
        if norm is None:  # the output is the stream or cannot be compared with it; writing is still tested
            return
        dtype = self.context.dtype
        stream_ND = torch.from_numpy(read.stream(self.context.layers[-1]))
        normed = norm(stream_ND.to(getattr(torch, dtype)).to(_device_of(norm)))
        want_ND = (normed[0] if isinstance(normed, tuple) else normed).float().cpu().numpy()
        got_ND = read.output_TD[self.rows].float().cpu().numpy()
        factor = float((got_ND * want_ND).sum() / ((want_ND * want_ND).sum() + 1e-30))
        error = largest_error(factor * want_ND, got_ND)
        if not error <= READING_TOLERANCE[dtype]:
            raise ModelFault(
                f"the final norm of the residual stream after the last layer is {error:.2g} off the model's output "
                f"(allowed: {READING_TOLERANCE[dtype]:g})"
            )

    def check_moved(self, done: ProofPass, layers: Sequence[int], read: ProofPass) -> None:
        """Rows that were moved are where they should be, in the captures and the output, and no other row has moved."""
        what, is_exact, kept = "a row without a program changes beside steered ones", self.is_exact, len(self.kept)
        self._check_same(self._others(done.output_TD), self._others(self.idle_TD), what, is_exact)
        for layer in self.context.layers:
            untouched = [*range(kept), *(kept + number for number, moved in enumerate(layers) if layer < moved)]
            got_ND, want_ND = (torch.from_numpy(one.stream(layer)[untouched]) for one in (done, read))
            what = f"the stream after layer {layer} of a row that is not steered there differs from pass to pass"
            self._check_same(got_ND, want_ND, what, is_exact)
        for number, layer in enumerate(layers, start=kept):
            start_D, aim_D = self.reference.streams_LID[layer][[self.reference.start, self.reference.aim]]
            self._check_target(done.stream(layer)[number], start_D, aim_D, f"captured after layer {layer}")
        outputs = [
            tensor_TD[self.moved].float().cpu().numpy() for tensor_TD in (done.output_TD, self.idle_TD, self.aim_TD)
        ]
        for layer, got_D, start_D, aim_D in zip(layers, *outputs, strict=True):
            self._check_target(got_D, start_D, aim_D, f"replaced by another's after layer {layer}")

    def _check_target(
        self, got_D: npt.NDArray[Any], start_D: npt.NDArray[Any], aim_D: npt.NDArray[Any], what: str
    ) -> None:
        tolerance = WRITING_TOLERANCE[self.context.dtype]
        error = np.linalg.norm(got_D - aim_D) / np.linalg.norm(start_D - aim_D)
        if not error <= tolerance:
            raise ModelFault(
                f"a row whose residual stream was {what} differs from that row by {error:.2g} of their distance "
                f"(allowed: {tolerance:g})"
            )

    def _check_same(self, got: torch.Tensor, want: torch.Tensor, what: str, is_exact: bool) -> None:
        """The same bits, or as near as two classes are, where the model itself has not the same bits."""
        if has_same_bits(got, want):
            return
        error = largest_error(got.float().cpu().numpy(), want.float().cpu().numpy())
        if is_exact or not error <= READING_TOLERANCE[self.context.dtype]:
            raise StepFault(f"{what}, by up to {error:.2g} of a row's norm")

    def _others(self, output_TD: torch.Tensor) -> torch.Tensor:
        """All rows but those that are moved."""
        is_other_T = torch.ones(len(output_TD), dtype=torch.bool)
        is_other_T[self.moved] = False
        return output_TD[is_other_T.to(output_TD.device)]


def most_different(streams_ID: npt.NDArray[np.float32]) -> tuple[int, int]:
    """The two inputs whose residual streams differ most; raises ModelFault if all are equal, or not finite."""
    norms_I = np.linalg.norm(streams_ID, axis=-1)
    distances_II = np.linalg.norm(streams_ID[:, None] - streams_ID, axis=-1) / (norms_I[:, None] + norms_I + 1e-30)
    start, aim = np.unravel_index(np.argmax(np.nan_to_num(distances_II, nan=0.0, posinf=0.0)), distances_II.shape)
    if not distances_II[start, aim] > LEAST_DIFFERENCE:
        raise ModelFault("the residual stream after the last layer is the same for every input, or not finite")
    return int(start), int(aim)


def largest_error(got_ND: npt.NDArray[np.float32], want_ND: npt.NDArray[np.float32]) -> float:
    """The largest distance of a row from the wanted one, in units of the latter's norm; infinite for NaN."""
    distance_N, norm_N = np.linalg.norm(got_ND - want_ND, axis=-1), np.linalg.norm(want_ND, axis=-1)
    return float(np.nan_to_num(distance_N / (norm_N + 1e-30), nan=np.inf).max(initial=0.0))


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shapes and bits: NaN equals itself, and 0.0 is not -0.0."""
    if one.shape != other.shape or not one.numel():  # an empty tensor may have strides that `view` refuses
        return one.shape == other.shape
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def hash_of(stream_ND: npt.NDArray[Any]) -> str:
    """A hash of the rows of one stream, by which ranks compare them."""
    return sha256(stream_ND.tobytes()).hexdigest()


def _device_of(module: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
