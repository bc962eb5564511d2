"""Loads a model for commands: by name, with what suits the machine, and with errors of a line."""

import torch

from steer_service.core.errors import InvalidRequest, NotFound, SteerError
from steer_service.hf.bundled_model import NAME, ensure_bundled_model
from steer_service.hf.model import HFSteeringModel


def load_model(model: str | None = None, *, dtype: str | None = None, device: str | None = None) -> HFSteeringModel:
    """The model that transformers know as `model`, a folder or name; None is the bundled model.

    `device` is by default cuda if there is one, or cpu; `dtype` the model's own, on a CPU float32, which is several
    times faster there than 16 bits. Raises NotFound for a model that cannot be loaded, and where `check_device` does.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    name = model or NAME
    source = model or ensure_bundled_model()
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    try:
        return HFSteeringModel(source, name=name, dtype=dtype).to(device)
    except SteerError:
        raise
    except (OSError, ValueError) as error:  # of transformers, often of several lines
        raise NotFound(f"{name} cannot be loaded: {str(error).splitlines()[0]}", reason="NO_MODEL") from error


def check_device(name: str) -> None:
    """Raises InvalidRequest for what torch does not know as a device, and for a GPU that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(f"{name:.40} is no device", reason="UNKNOWN_DEVICE", field="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"torch finds no GPU for {name:.40}", reason="UNKNOWN_DEVICE", field="device")
