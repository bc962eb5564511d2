"""Which model `steer train` and `steer vectors sweep` work on: one that transformers run here, or a server's."""

import argparse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from steer_client import AsyncSteerClient
from steer_client.channel import check_address
from steer_service.cli.arguments import UsageError
from steer_service.cli.progress import say
from steer_service.core.specs import SteeringSpec
from steer_service.directions.sweep import Measure, target_log_probabilities
from steer_service.directions.targets import Target
from steer_service.directions.training import log_probabilities
from steer_service.hf.bundled_model import NAME
from steer_service.hf.loading import check_torch_device, load_model
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.calls import SteeringCalls


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model is wanted."""

    model: str | None
    """What transformers load; None for the bundled model."""
    address: str | None
    """Where the server is that has it instead; None for a model that is loaded here."""
    dtype: str | None
    """Element type to load it with; None for its own, or float32 on a CPU, where that is several times faster."""
    device: str | None
    """Where to load it; None for cuda if there is one, or cpu."""


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that is open."""

    calls: SteeringCalls
    """It as a backend; of transformers, an HFSteeringModel."""
    measure: Callable[[Sequence[Target]], Measure]
    """How likely it finds targets, in the cheapest way there is."""
    revision: str | None = None
    """Which commit of a hub's model it is; None if that is not known."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of the model."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--model", metavar="MODEL", help="a folder or name that transformers load (default: the bundled model)"
    )
    where.add_argument("--address", help="the model of this running server instead, host:port or unix:/path")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of a model that is loaded here (default: the model's own; on a CPU float32)",
    )
    parser.add_argument(
        "--device", help="of a model that is loaded here: where (default: cuda if there is one, or cpu)"
    )


def model_choice_from(namespace: argparse.Namespace) -> ModelChoice:
    """The choice; raises UsageError if it makes no sense, InvalidRequest for an address or a device that is none."""
    if namespace.address is not None:
        for option in ("dtype", "device"):
            if getattr(namespace, option) is not None:
                raise UsageError(f"--{option}: a server's model is loaded already")
        check_address(namespace.address)
    if namespace.device is not None:
        check_torch_device(namespace.device)
    return ModelChoice(namespace.model, namespace.address, namespace.dtype, namespace.device)


@asynccontextmanager
async def open_model(choice: ModelChoice) -> AsyncIterator[OpenModel]:
    """The model; raises NotFound for one that transformers cannot load, EngineFailed if there is no server."""
    if choice.address is not None:
        async with await AsyncSteerClient.connect(choice.address) as client:
            yield OpenModel(client, partial(partial, target_log_probabilities, client))
        return
    say(f"loading {choice.model or NAME}")
    with load_model(choice.model, dtype=choice.dtype, device=choice.device) as model:
        yield OpenModel(model, partial(_forward_measure, model), model.revision)


def _forward_measure(model: HFSteeringModel, targets: Sequence[Target]) -> Measure:
    async def measure(steering: SteeringSpec | None) -> npt.NDArray[np.float64]:
        return log_probabilities(model, targets, steering)

    return measure
