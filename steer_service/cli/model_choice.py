"""Which model `steer train` and `steer vectors sweep` use: one that transformers load here, or a server's."""

import argparse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from steer_client import AsyncSteerClient
from steer_service.cli.arguments import UsageError
from steer_service.cli.connection import CREDENTIALS, Connection, add_credential_arguments, connection_from
from steer_service.cli.progress import print_message
from steer_service.core.specs import SteeringSpec
from steer_service.directions.sweep import Measure, target_measure
from steer_service.directions.targets import Target
from steer_service.directions.training import log_probabilities
from steer_service.hf.bundled_model import NAME
from steer_service.hf.loading import check_torch_device, load_model
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.calls import SteeringCalls


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model to use."""

    model: str | None
    """Folder or name of a model for transformers; None for the bundled model."""
    connection: Connection | None
    """The server to use instead; None for a model that is loaded here."""
    dtype: str | None
    """Dtype to load it with; None for the model's own, or float32 on a CPU, where that is several times faster."""
    device: str | None
    """Device to load it on; None for cuda if there is one, or cpu."""


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that is open."""

    calls: SteeringCalls
    """The model as a backend; an HFSteeringModel if transformers run it."""
    measure: Callable[[Sequence[Target]], Measure]
    """Measures the likelihood of targets in the cheapest way."""
    revision: str | None = None
    """The commit, for a model from a hub; None if it is not known."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of the model."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--model", metavar="MODEL", help="folder or name of a model that transformers load (default: the bundled model)"
    )
    where.add_argument("--address", help="use the model of a running server: host:port or unix:/path")
    add_credential_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of a model that is loaded here (default: the model's own; on a CPU float32)",
    )
    parser.add_argument(
        "--device", help="device of a model that is loaded here (default: cuda if there is one, or cpu)"
    )


def model_choice_from(namespace: argparse.Namespace) -> ModelChoice:
    """The choice; raises UsageError for options that exclude each other, InvalidRequest for a bad address or device."""
    connection = None
    if namespace.address is not None:
        for option in ("dtype", "device"):
            if getattr(namespace, option) is not None:
                raise UsageError(f"--{option}: a server's model is loaded already")
        connection = connection_from(namespace)
    else:
        for option in CREDENTIALS:
            if getattr(namespace, option):
                raise UsageError(f"--{option.replace('_', '-')} needs --address")
    if namespace.device is not None:
        check_torch_device(namespace.device)
    return ModelChoice(namespace.model, connection, namespace.dtype, namespace.device)


@asynccontextmanager
async def open_model(choice: ModelChoice) -> AsyncIterator[OpenModel]:
    """The model; raises NotFound for one that transformers cannot load, EngineFailed if there is no server."""
    if choice.connection is not None:
        connecting = AsyncSteerClient.connect(choice.connection.address, **choice.connection.options)
        async with await connecting as client:
            yield OpenModel(client, partial(target_measure, client))
        return
    print_message(f"loading {choice.model or NAME}")
    with load_model(choice.model, dtype=choice.dtype, device=choice.device) as model:
        yield OpenModel(model, partial(_forward_measure, model), model.revision)


def _forward_measure(model: HFSteeringModel, targets: Sequence[Target]) -> Measure:
    async def measure(steering: SteeringSpec | None) -> npt.NDArray[np.float64]:
        return log_probabilities(model, targets, steering)

    return measure
