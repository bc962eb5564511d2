"""A torch DataLoader with forked workers, in a process that has captures mapped.

It takes seconds to import, so a client's process imports it only for a run with work.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.soak.client_calls import LAYERS, some_prompt
from bench.soak.client_results import INFO, Wrong, check_rows, rows_of
from steer_client import CaptureSpec, SteerClient, SteerError, SyncCaptureHandle
from steer_service.core.prompt import TextPrompt

MAPPED = CaptureSpec(layers=LAYERS, delivery="shared_memory_required")

TOKENS = 3
"""Tokens that are generated after each prompt."""

ORPHANED_S = 5.0
"""Seconds after which a worker whose connection ended still has its parent, if the parent was not killed."""


class LastRows(Dataset[Any]):
    """The number of each capture and the last row of its first layer; NaN for a capture that cannot be read.

    A worker maps the captures that its parent has not read.
    """

    def __init__(self, handles: Sequence[SyncCaptureHandle]) -> None:
        self._handles = handles

    def __len__(self) -> int:
        return len(self._handles)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self._handles[index].fetch()[LAYERS[0]][0]["hidden"][-1]
        except SteerError:
            return index, np.full(INFO.hidden_size, np.nan, np.float32)


def load_rows(address: str, options: dict[str, Any], chance: random.Random) -> None:
    """Workers read what their parent has mapped: all of it, until one is killed, or until their parent gives up.

    Some times the client is closed meanwhile. Raises Wrong for another row, also in the parent afterwards.
    """
    prompts = [some_prompt(chance) for _ in range(chance.randint(4, 12))]
    with SteerClient(address, **options) as client:
        handles = client.generate(prompts, max_tokens=TOKENS, capture=MAPPED).handles
        assert handles is not None
        ending = chance.choice(("read", "left", "killed", "closed"))
        for handle in handles if ending == "closed" else handles[::2]:  # what a closed client's server frees is read
            handle.fetch()
        loader = DataLoader(
            LastRows(handles),
            batch_size=2,
            num_workers=2,
            multiprocessing_context="fork",
            worker_init_fn=_say_nothing_if_orphaned,
        )
        _load(iter(loader), prompts, handles, ending, client)
        for handle, prompt in zip(handles[::2], prompts[::2], strict=True):
            check_rows(handle.captures, LAYERS, prompt, TOKENS)


def _say_nothing_if_orphaned(_: int) -> None:
    """A worker whose parent is killed while it takes a batch has nothing to report."""
    parent = os.getppid()

    def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        until_s = time.monotonic() + ORPHANED_S
        while isinstance(error, EOFError | OSError) and time.monotonic() < until_s:
            if os.getppid() != parent:
                return
            time.sleep(0.05)
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = report


def _load(
    batches: Any, prompts: Sequence[TextPrompt], handles: Sequence[SyncCaptureHandle], ending: str, client: SteerClient
) -> None:
    seen = list[int]()
    for indices, rows in batches:
        for index, row in zip(indices.tolist(), rows, strict=True):
            seen.append(index)
            if row.isnan().any():
                handles[index].fetch()  # raises why, such as a server that was killed
            if not torch.equal(row, torch.from_numpy(rows_of(LAYERS[0], prompts[index], TOKENS)[-1])):
                raise Wrong(f"a worker of a loader read another row of {prompts[index]}: {row[:4]}")
        if ending == "left":
            return
        if ending == "closed":
            client.close()
        if ending == "killed":
            os.kill(batches._workers[0].pid, signal.SIGKILL)
            try:
                for _ in batches:
                    pass
            except (OSError, EOFError):  # while a batch of it was received
                pass
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
            return
    if seen != [*range(len(prompts))]:
        raise Wrong(f"a loader gave the rows {seen} of {len(prompts)}")
