"""The one folder that knows vLLM: the in-process engine, its worker, and the seams between them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_service.engine.model import VLLMSteeringModel

__all__ = ["VLLMSteeringModel"]


def __getattr__(name: str) -> Any:
    """`VLLMSteeringModel`, imported on first use: the workers import this folder too and do not need it."""
    if name == "VLLMSteeringModel":
        from steer_service.engine.model import VLLMSteeringModel

        return VLLMSteeringModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
