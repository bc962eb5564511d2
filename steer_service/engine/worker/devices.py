"""Which hooks a device has, and which devices have none."""

from steer_service.core.errors import Unsupported
from steer_service.engine.worker.hooks import HookContext, Hooks
from steer_service.engine.worker.hooks_cpu import CpuHooks
from steer_service.engine.worker.hooks_cuda import CudaHooks

DEVICE_TYPES = ("cpu", "cuda")
"""Types of torch's devices for which there are hooks; those of AMD are "cuda" too."""


def hooks_for(context: HookContext) -> Hooks:
    """Makes the hooks of the device on which the model runs."""
    return CudaHooks(context) if context.device.type == "cuda" else CpuHooks(context)


def check_device(device_type: str) -> None:
    """Raises Unsupported unless there are hooks for devices of torch's type `device_type`.

    Addresses of another device's memory would be taken for the host's.
    """
    if device_type not in DEVICE_TYPES:
        raise Unsupported(
            f"there are no hooks for devices of type {device_type!r}, only for {' and '.join(DEVICE_TYPES)}",
            reason="DEVICE_NOT_SUPPORTED",
        )
