"""Loads a model for commands: by name, on the device and with the dtype that suit the machine, with one-line errors."""

import torch

from steer_service.core.errors import InvalidRequest, NotFound, SteerError
from steer_service.hf.bundled_model import NAME, ensure_bundled_model
from steer_service.hf.model import HFSteeringModel


def load_model(model: str | None = None, *, dtype: str | None = None, device: str | None = None) -> HFSteeringModel:
    """Loads `model`, a folder or name that transformers can load; None is the bundled model.

    `device` is by default cuda if there is one, or cpu. `dtype` is by default the model's own. On a CPU it is float32,
    which is several times faster there than 16 bits. Raises NotFound for a model that cannot be loaded, and
    InvalidRequest where `check_torch_device` does.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_torch_device(device)
    name = model or NAME
    source = model or ensure_bundled_model()
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    try:
        return HFSteeringModel(source, name=name, dtype=dtype).to(device)
    except SteerError:
        raise
    except (OSError, ValueError) as error:  # from transformers, often several lines long
        raise NotFound(f"{name} cannot be loaded: {str(error).splitlines()[0]}", reason="NO_MODEL") from error


def check_torch_device(name: str) -> None:
    """Raises InvalidRequest if torch does not know this device, or finds no GPU for it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(f"{name:.40} is not a device of torch", reason="UNKNOWN_DEVICE", field="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"torch finds no GPU for {name:.40}", reason="UNKNOWN_DEVICE", field="device")
