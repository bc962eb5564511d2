"""A hook of MkDocs: pages of the API reference, made from what the packages export and from its docstrings.

`steer_client.__all__` names the groups of its classes in comments: each group becomes a page. The names of the other
modules are listed here. mkdocstrings reads the source and imports nothing, so the site needs no torch and no vLLM.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

GROUPS = {
    "clients": "A client of a running server, with an event loop and without one.",
    "steering": "What a request steers, at which positions, and how it is read from files.",
    "requests": "Prompts, sampling options, captures, and the request that they make.",
    "results": "What a call returns: texts, outputs, receipts and captured rows.",
    "events": "What happens to one request, in its order.",
    "errors": "Every error is a `SteerError`. [Errors](../errors.md) lists the reasons.",
}
"""Group of `steer_client.__all__` -> the first sentence of its page."""

Names = Sequence[str]

OTHERS: Mapping[str, tuple[str, Sequence[str] | Mapping[str, Names]]] = {
    "backends": (
        "A model in your own process, with the calls of a client; training with gradients.",
        (
            "steer_service.engine.model.VLLMSteeringModel",
            "steer_service.hf.model.HFSteeringModel",
            "steer_service.hf.trainable_model.TrainableModel",
            "steer_service.hf.trainable.TrainableAdd",
            "steer_service.hf.trainable.TrainableCap",
            "steer_service.hf.trainable.TrainableAblation",
        ),
    ),
    "formats": (
        "Files: steering, vectors of other projects, captured rows.",
        {
            "steer_service.formats.checkpoint": (
                "save_spec",
                "load_spec",
                "read_checkpoint",
                "write_checkpoint",
                "Checkpoint",
                "SavedModel",
                "Trained",
            ),
            "steer_service.formats.vector_files": ("read_vectors", "write_vectors"),
            "steer_service.formats.layer_vectors": ("Imported", "spec_of_additions"),
            "steer_service.formats.spec_json": ("spec_from_text", "spec_from_json", "spec_to_json"),
            "steer_service.formats.capture_dataset": ("load_captures", "CaptureShard", "LABELS", "WINDOW_LABELS"),
        },
    ),
}
"""Page -> its first sentence, and what it documents; of a module, the names that users need."""

_ENUMERATIONS = {
    name
    for path in (ROOT / "steer_service" / "core").glob("*.py")
    for name in re.findall(r"^class (\w+)\((?:enum\.)?\w*Enum\)", path.read_text(encoding="utf-8"), re.MULTILINE)
}

TITLES = {"backends": "In your own process", "formats": "Files"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages in api/."""
    pages = {name: (sentence, exported()[name]) for name, sentence in GROUPS.items()} | dict(OTHERS)
    for name, (sentence, objects) in pages.items():
        title = TITLES.get(name, name.capitalize())
        names = objects if isinstance(objects, Mapping) else dict.fromkeys(objects, ())
        parts = [f"# {title}\n\n{sentence}\n", *(_documented(one, members) for one, members in names.items())]
        files.append(File.generated(config, f"api/{name}.md", content="\n".join(parts)))
    rows = "".join(f"| [{TITLES.get(name, name.capitalize())}]({name}.md) | {pages[name][0]} |\n" for name in pages)
    index = (
        "# API reference\n\nThe classes and functions that programs use, from their docstrings. "
        "`steer_client` needs neither torch nor vLLM.\n\n| page | content |\n|---|---|\n" + rows
    )
    files.append(File.generated(config, "api/index.md", content=index))
    return files


def _documented(name: str, members: Names) -> str:
    """The directive of mkdocstrings; the members of an enumeration have their values, which users may write instead."""
    options = ["      show_attribute_values: true\n"] if name.rpartition(".")[2] in _ENUMERATIONS else []
    options += [f"      members: [{', '.join(members)}]\n"] if members else []
    return "".join([f"::: {name}\n", *(["    options:\n"] if options else []), *options])


def exported() -> dict[str, list[str]]:
    """Group of `steer_client.__all__`, named by its comment -> the full names in it."""
    text = (ROOT / "steer_client" / "__init__.py").read_text(encoding="utf-8").partition("__all__")[2]
    groups: dict[str, list[str]] = {}
    for comment, name in re.findall(r"^ +(?:# (\w+)|\"(\w+)\",)$", text, re.MULTILINE):
        if comment:
            groups[comment] = []
        else:
            groups[list(groups)[-1]].append(f"steer_client.{name}")
    return groups
