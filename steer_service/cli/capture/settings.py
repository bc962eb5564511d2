"""The settings of a run in the words of the command line: what differs from those that filled a folder."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

OPTIONS = {
    "layers": "--layers",
    "site": "--site",
    "pooling": "--pooling",
    "positions": "--positions",
    "truncate_prompt_tokens": "--truncate-prompt-tokens",
    "context": "--context",
    "stride": "--stride",
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
    "seed": "--seed",
}
"""Field of the manifest's first line -> the option that gives its value. null: the option was not given."""
SWITCHES = {"truncate": ("--truncate", True), "add_special_tokens": ("--no-special-tokens", False)}
"""Field -> the option without a value that sets it, and to what."""
SHOWN_DIGITS = 12
"""Digits of a digest that tell two apart."""
SHOWN_WIDTH = 60
"""Characters of a fact about the model or the format, which may be a long list."""


def differences(folder: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a folder was filled with and what this run is with, where the two differ; None if they are equal.

    `folder`, `run`: the first lines of their manifests. A line of an earlier version may lack fields.
    """
    names = [name for name in {**run, **folder} if folder.get(name) != run.get(name)]
    if not names:
        return None
    of_folder, of_run = (", ".join(in_words(name, line.get(name)) for name in names) for line in (folder, run))
    return of_folder, of_run


def in_words(name: str, value: Any) -> str:
    """One setting, such as "with --layers 1,2" or "without --truncate"."""
    if name in SWITCHES:
        option, given = SWITCHES[name]
        return f"with {option}" if value is given else f"without {option}"
    if name in OPTIONS:
        return f"without {OPTIONS[name]}" if value is None else f"with {_option(OPTIONS[name], value)}"
    match name:
        case "dtype":
            return f"with rows in {value} (--dtype)"
        case "adapter":
            return "without an adapter" if value is None else f"with the adapter {value} (--model)"
        case "model":
            return f"with the model {value}"
        case "steering_digest":
            return "without --steering" if value is None else f"with the --steering {value[:SHOWN_DIGITS]}"
    return f"with {name} {textwrap.shorten(json.dumps(value), SHOWN_WIDTH, placeholder=' ...')}"


def _option(option: str, value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{option}={text}" if text.startswith("-") else f"{option} {text}"
