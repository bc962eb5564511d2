"""`steer serve` on the deterministic model, in processes of its own."""

import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil

from steer_service.cli.server_process import ServerProcess
from tests.engine.deterministic_model.drive import ARGUMENTS, few_threads
from tests.engine.deterministic_model.plugin import make_folder, plugged_in
from tests.processes import until


class RealServer(ServerProcess):
    """A server that can be killed, and the processes that vLLM started for it."""

    def processes(self) -> list[psutil.Process]:
        """Its main process and all that come of it, as they are now."""
        main = psutil.Process(self.pid)
        return [main, *main.children(recursive=True)]

    async def wait_until_listening(self) -> None:
        await until(lambda: bool(self.address))

    async def kill(self) -> None:
        """Ends the main process at once, and nothing else."""
        os.kill(self.pid, signal.SIGKILL)
        await until(lambda: self.status is not None)


@contextmanager
def servable_model(folder: Path) -> Iterator[Path]:
    """The folder of the deterministic model, which servers that are started within the block can serve."""
    with plugged_in(folder / "plugin"), few_threads():
        yield make_folder(folder / "model")


@asynccontextmanager
async def listening(model: Path, shm_dir: Path, **arguments: Any) -> AsyncIterator[RealServer]:
    """A server that listens and loads the model."""
    flags = flags_of({**ARGUMENTS, "shm_dir": shm_dir, **arguments})
    async with RealServer([str(model), *flags]) as server:
        await server.wait_until_listening()
        yield server


@asynccontextmanager
async def serving(model: Path, shm_dir: Path, **arguments: Any) -> AsyncIterator[RealServer]:
    """A server that answers."""
    async with listening(model, shm_dir, **arguments) as server:
        await server.wait_until_serving()
        yield server


def flags_of(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Engine arguments as flags of the command line."""
    for name, value in arguments.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)
