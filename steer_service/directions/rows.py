"""Rows that represent prompts, captured on any backend. A served model needs no second copy.

Letters: R rows (one per prompt), D hidden size.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import Prompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.handle import CaptureHandle

Rows = npt.NDArray[Any]
"""One row of the residual stream for each prompt, shape [R, D]."""

LayerRows = Mapping[int, Rows]
"""Layer -> its rows, one per prompt, in the order of the prompts."""

PROMPTS_AT_ONCE = 16
"""Prompts whose rows are captured at a time; only their rows are held."""

DEFAULT_GENERATED = 16
"""Tokens to generate for MEAN_GENERATED."""


class RowChoice(enum.Enum):
    """Which row of the residual stream represents a prompt."""

    LAST_PROMPT = "last-prompt"
    """The row of the prompt's last token."""
    MEAN_GENERATED = "mean-generated"
    """The mean over greedily generated tokens, without the last, which is never fed to the model."""


async def collect_rows(
    model: SteeringCalls,
    prompts: Iterable[Prompt],
    layers: Sequence[int],
    choice: RowChoice = RowChoice.LAST_PROMPT,
    *,
    max_tokens: int = DEFAULT_GENERATED,
) -> dict[int, Rows]:
    """Layer -> the rows of all prompts, float32, shape [R, D]. Shows a bar on standard error.

    Works on every backend. Only the chosen rows are captured, for a few prompts at a time. `max_tokens` is for
    MEAN_GENERATED, at least 2. Raises InvalidRequest without prompts and for a request that the model refuses.
    """
    prompts = list(prompts)
    if not prompts:
        raise InvalidRequest("there are no prompts to capture", reason="NO_PROMPTS", field="prompts")
    sampling, capture = _request_for(choice, tuple(layers), max_tokens)
    rows: dict[int, list[Rows]] = {layer: [] for layer in capture.layers}
    with tqdm(total=len(prompts), desc="capture", unit="prompt", disable=None) as bar:
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[first : first + PROMPTS_AT_ONCE]
            _, handles = await model.generate(some, sampling, capture=capture)
            assert handles is not None
            for handle in handles:
                for layer, row in (await _mean_rows(handle)).items():
                    rows[layer].append(row)
            bar.update(len(some))
    return {layer: np.stack(of_layer) for layer, of_layer in rows.items()}


def _request_for(choice: RowChoice, layers: tuple[int, ...], max_tokens: int) -> tuple[SamplingOptions, CaptureSpec]:
    if choice is RowChoice.LAST_PROMPT:
        return (
            SamplingOptions(max_tokens=0),
            CaptureSpec(layers=layers, positions=-1, dtype="float32"),  # type: ignore[arg-type]
        )
    # Two tokens at least: the first of them is fed to the model and has a row.
    return (
        SamplingOptions(max_tokens=max_tokens, min_tokens=2, temperature=0.0),
        CaptureSpec(layers=layers, positions="generated", dtype="float32"),  # type: ignore[arg-type]
    )


async def _mean_rows(handle: CaptureHandle) -> dict[int, Rows]:
    async with handle:
        rows = (await handle.fetch_rows()).hidden
        return {layer: of_layer.mean(axis=0, dtype=np.float64).astype(np.float32) for layer, of_layer in rows.items()}
