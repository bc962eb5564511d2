"""What calls of the Python client must return on the fake backend, and which errors faults explain."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from steer_service.core.errors import DeadlineExceeded, EngineFailed, NotFound, SteerError, Unsupported
from steer_service.core.prompt import Prompt
from steer_service.runtime.results import Generation
from steer_service.testing.fake_backend import FAKE_MODEL, encode_row, text_of, token_at
from steer_service.testing.fake_prompts import rendered

INFO = replace(FAKE_MODEL, hidden_size=64)
"""The model of the server."""

LOST = {
    EngineFailed: {
        *("UNREACHABLE", "CONNECTION_LOST", "CAPTURE_LOST", "SESSION_ENDED", "DRAINING", "LOADING", "CANCELLED"),
        "NO_SHARED_MEMORY",
    },
    NotFound: {"UNKNOWN_CAPTURE", "OTHER_INSTANCE"},
    Unsupported: {"NO_SHARED_MEMORY"},
    DeadlineExceeded: {"SERVER_SILENT", "DEADLINE_EXCEEDED"},
}
"""Errors of a server that was killed, was restarted or cannot be reached."""

FORGOTTEN = {"UNKNOWN_CAPTURE", "OTHER_INSTANCE", "CAPTURE_LOST"}
"""Reasons that only a fetch may have."""


class Wrong(Exception):
    """A result that cannot be right."""


def is_explained(error: BaseException) -> bool:
    """True for an error that a lost server explains."""
    return any(isinstance(error, kind) and error.reason in reasons for kind, reasons in LOST.items())


def name_of(error: BaseException) -> str:
    """The type of an error, and its reason if it has one."""
    return f"{type(error).__name__} {error.reason}" if isinstance(error, SteerError) else type(error).__name__


def tokens_after(prompt: Prompt, count: int) -> tuple[int, ...]:
    """The tokens that are generated after a prompt."""
    token_ids = rendered(prompt, INFO).token_ids
    return tuple(token_at(token_ids, 0, number, INFO.vocab_size) for number in range(count))


def check_generation(generation: Generation, prompt: Prompt, count: int) -> None:
    """Raises Wrong unless the prompt and all `count` tokens are right."""
    _check("prompt", tuple(generation.prompt_token_ids), rendered(prompt, INFO).token_ids)
    _check("tokens", tuple(generation.outputs[0].token_ids), tokens_after(prompt, count))


def check_text(text: str, prompt: Prompt, count: int, *, is_whole: bool = True) -> None:
    """Raises Wrong unless it is the text of the tokens, or its beginning."""
    right = "".join(map(text_of, tokens_after(prompt, count)))
    _check("text", text, right if is_whole else right[: len(text)])


def rows_of(layer: int, prompt: Prompt, count: int) -> Any:
    """The rows of a layer, for a prompt and the tokens after it."""
    token_ids = [*rendered(prompt, INFO).token_ids, *tokens_after(prompt, count)][:-1]
    return np.stack([encode_row(layer, position, token, INFO) for position, token in enumerate(token_ids)])


def check_rows(captures: Any, layers: Sequence[int], prompt: Prompt, count: int) -> None:
    """Raises Wrong unless each row of each layer is that of its position and token."""
    for layer in layers:
        right = rows_of(layer, prompt, count)
        rows = captures[layer][0]["hidden"]
        if not np.array_equal(rows, right):
            raise Wrong(f"rows of layer {layer}, shape {rows.shape}, of {prompt}")


def _check(what: str, got: object, right: object) -> None:
    if got != right:
        raise Wrong(f"{what}: {str(got)[:200]} in place of {str(right)[:200]}")
