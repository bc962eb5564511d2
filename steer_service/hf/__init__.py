"""Transformers: the embedded model, and models that are run, read and trained outside the engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_service.hf.model import HFSteeringModel
    from steer_service.hf.trainable import TrainableAblation, TrainableAdd, TrainableCap

__all__ = ["HFSteeringModel", "TrainableAblation", "TrainableAdd", "TrainableCap"]


def __getattr__(name: str) -> Any:
    """The classes, imported on first use: whoever wants the embedded model's folder needs no torch."""
    if name == "HFSteeringModel":
        from steer_service.hf.model import HFSteeringModel

        return HFSteeringModel
    if name in __all__:
        from steer_service.hf import trainable

        return getattr(trainable, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
