"""The proof at start: on the device and the model that will serve, steering and capture are right, or it is refused.

First the kernel (kernel_proof.py), then the loaded model in each class of steps (model_proof.py, dispatch.py). Programs
are in the engine's bank, because a recorded graph reads no other, and are removed at the end. The ranks of an engine
refuse together (rank_agreement.py).
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from steer_service.core.errors import SteerError, Unsupported
from steer_service.core.start_proof import StartProof
from steer_service.engine.worker.dispatch import DESCRIPTIONS, modes_to_observe, shapes_to_prove
from steer_service.engine.worker.dummy_run import INPUTS
from steer_service.engine.worker.kernel_proof import KernelFault, prove_kernel
from steer_service.engine.worker.model_proof import MOVED, HookedModel, ModelProof
from steer_service.engine.worker.proof_checks import ModelFault, StepFault
from steer_service.engine.worker.rank_agreement import agreed_finding

Proven = TypeVar("Proven")

NOT_READ = "the hooks do not read and write this model's residual stream"
WRONG_DEVICE = (
    "Results of this device cannot be trusted. Try another version of Triton, and report it with the output of "
    "`steer selftest`"
)
WRONG_STREAM = (
    "The output of its layers is not what engine/worker/layer_outputs.py or steer_allow_unverified states. Try another "
    "value of --steer-allow-unverified, another --attention-backend, or --enforce-eager, and report it if the model's "
    "family is listed in docs/models.md"
)
NOT_EXACT = "hooks of this model act where they should not, or do not act where they should"
WRONG_STEP = (
    "Steps of this kind would be steered or captured wrongly. Try --enforce-eager, which uses no graphs, or another "
    "--attention-backend, and report it with this text and the version of vLLM"
)


@torch.inference_mode()
def run_self_test(model: HookedModel) -> StartProof:
    """Raises Unsupported (TAP_SELF_TEST_FAILED) on every rank, unless steering and capture are right on all."""
    began = time.monotonic()
    device = _device_name(model.context.device)
    kernel = _agreed(
        lambda: prove_kernel(model.context, model.hooks),
        f"steered or captured rows are not right on {device}",
        WRONG_DEVICE,
    )
    proof, shapes = ModelProof(model), shapes_to_prove(model.runner, INPUTS + MOVED)
    reference = _agreed(lambda: proof.read(shapes[0]), NOT_READ, WRONG_STREAM)
    classes, modes, is_exact = list[str](), set[str](), True
    for number, shape in enumerate(shapes):
        at_once = proof.moved_at_once(shape, reference)
        for first in range(0, len(reference.layers) if number == 0 else 1, at_once):
            shown = proof.prove(shape, reference, first)
            _refuse_together(_text_of(shown.fault), shown.streams)
            classes.append(str(shown.ran_as))
            modes.add(shown.ran_as.mode)
            is_exact &= shown.is_exact
    unseen = modes_to_observe(model.runner) - modes
    finding = ""
    if unseen:
        ways = " and ".join(DESCRIPTIONS.get(mode, mode) for mode in sorted(unseen))
        finding = _text("steps would be run in ways that were not tested", f"no test has replayed {ways}", WRONG_STEP)
    _refuse_together(finding)
    return StartProof(
        device=device,
        seconds=time.monotonic() - began,
        kernel_rows=kernel.rows,
        kernel_error=kernel.worst,
        step_classes=tuple(dict.fromkeys(classes)),
        is_exact=is_exact,
        staging_bytes=model.hooks.staging_bytes,
        pinned_bytes=model.hooks.pinned_bytes,
    )


def _agreed(prove: Callable[[], Proven], what: str, advice: str) -> Proven:
    """What `prove` returns; a fault that it raises on one rank refuses the model on all."""
    proven, finding = list[Proven](), ""
    try:
        proven.append(prove())
    except (KernelFault, ModelFault, SteerError) as error:
        finding = _text(what, error, advice)
    _refuse_together(finding)
    return proven[0]


def _text_of(fault: ModelFault | None) -> str:
    """What is wrong and what to try; "" for None."""
    if fault is None:
        return ""
    is_of_step = isinstance(fault, StepFault)
    return _text(NOT_EXACT if is_of_step else NOT_READ, fault, WRONG_STEP if is_of_step else WRONG_STREAM)


def _text(what: str, finding: object, advice: str) -> str:
    return f"{what}: {finding}. {advice}"


def _refuse_together(finding: str, streams: Sequence[tuple[str, str]] = ()) -> None:
    """Raises Unsupported on all ranks if one of them has a finding, or their streams differ."""
    found = agreed_finding(finding, streams)
    if found:
        raise Unsupported(found, reason="TAP_SELF_TEST_FAILED")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
