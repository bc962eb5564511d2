"""Rows that represent prompts, captured on any backend. A served model needs no second copy.

Letters: R rows (one per prompt), D hidden size.
"""

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.positions import Positions, scope_from
from steer_service.core.prompt import Prompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.together import together

Rows = npt.NDArray[Any]
"""One row of the residual stream for each prompt, shape [R, D]."""

LayerRows = Mapping[int, Rows]
"""Layer -> its rows, one per prompt, in the order of the prompts."""

PROMPTS_AT_ONCE = 16
"""Prompts whose rows are captured at a time; only their rows are held."""

DEFAULT_GENERATED = 16
"""Tokens to generate for MEAN_GENERATED."""


class RowChoice(enum.Enum):
    """Which row of the residual stream represents a prompt; a number is the row at that position."""

    LAST_PROMPT = "last-prompt"
    """The row of the prompt's last token."""
    MEAN_GENERATED = "mean-generated"
    """The mean over greedily generated tokens, without the last, which is never fed to the model."""
    LAST_MESSAGE = "last-message"
    """The mean over the text of a chat's last message, without what the chat template adds before and after it."""


POSITIONS: dict[RowChoice, Positions] = {
    RowChoice.LAST_PROMPT: -1,
    RowChoice.MEAN_GENERATED: "generated",
    RowChoice.LAST_MESSAGE: "messages[-1]",
}
"""Choice -> the positions whose mean it is."""


def row_choice_from(text: str) -> RowChoice | int:
    """The choice in `text`: the value of a RowChoice or a position such as -2; raises InvalidRequest for another."""
    if re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        return int(text)
    try:
        return RowChoice(text)
    except ValueError:
        known = ", ".join(choice.value for choice in RowChoice)
        raise InvalidRequest(
            f"{text!r:.40} is not {known} or a position such as -2", reason="BAD_POSITION", field="rows"
        ) from None


async def collect_rows(
    model: SteeringCalls,
    prompts: Iterable[Prompt],
    layers: Sequence[int],
    choice: RowChoice | int = RowChoice.LAST_PROMPT,
    *,
    max_tokens: int = DEFAULT_GENERATED,
    names: Sequence[str] | None = None,
) -> dict[int, Rows]:
    """Layer -> the rows of all prompts, float32, shape [R, D]. Shows a bar on standard error.

    Works on every backend. Only the chosen rows are captured, for a few prompts at a time. A number as `choice` is a
    position in each prompt: 0 is its first token and -1 its last. `max_tokens` is for MEAN_GENERATED, at least 2.
    `names` are those of the prompts in errors, by default `prompts[0]` and so on. Raises InvalidRequest without
    prompts and for a request that the model refuses, such as a position that a prompt does not have, and Unsupported
    with the reason for LAST_MESSAGE where the positions of the messages are not known.
    """
    prompts = list(prompts)
    if not prompts:
        raise InvalidRequest("there are no prompts to capture", reason="NO_PROMPTS", field="prompts")
    sampling, capture = _request_for(choice, tuple(layers), max_tokens)
    rows: dict[int, list[Rows]] = {layer: [] for layer in capture.layers}
    with tqdm(total=len(prompts), desc="capture", unit="prompt", disable=None) as bar:
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = range(len(prompts))[first : first + PROMPTS_AT_ONCE]
            for found in await together(
                _rows_of(model, prompts[index], sampling, capture, names[index] if names else f"prompts[{index}]")
                for index in some
            ):
                for layer, row in found.items():
                    rows[layer].append(row)
            bar.update(len(some))
    return {layer: np.stack(of_layer) for layer, of_layer in rows.items()}


async def _rows_of(
    model: SteeringCalls, prompt: Prompt, sampling: SamplingOptions, capture: CaptureSpec, name: str
) -> dict[int, Rows]:
    with within(name):
        _, handles = await model.generate([prompt], sampling, capture=capture)
        assert handles is not None, "a capture was asked for"
        return await _mean_rows(handles[0])


def _request_for(
    choice: RowChoice | int, layers: tuple[int, ...], max_tokens: int
) -> tuple[SamplingOptions, CaptureSpec]:
    positions = scope_from(POSITIONS[choice] if isinstance(choice, RowChoice) else choice)
    capture = CaptureSpec(layers=layers, positions=positions, dtype="float32")
    if choice is not RowChoice.MEAN_GENERATED:
        return SamplingOptions(max_tokens=0), capture
    # Two tokens at least: the first of them is fed to the model and has a row.
    return SamplingOptions(max_tokens=max_tokens, min_tokens=2, temperature=0.0), capture


async def _mean_rows(handle: CaptureHandle) -> dict[int, Rows]:
    async with handle:
        rows = (await handle.fetch_rows()).hidden
        return {layer: of_layer.mean(axis=0, dtype=np.float64).astype(np.float32) for layer, of_layer in rows.items()}
