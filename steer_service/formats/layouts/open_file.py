"""A file with its content and the user's options, and the refusals that name them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import InvalidRequest, SteerError, within
from steer_service.core.field_checks import MAX_LAYER_INDEX, check_layer
from steer_service.core.specs import SteeringOp
from steer_service.formats.layer_vectors import Imported, check_same_size
from steer_service.formats.layouts.read_options import OPTIONS, ReadOptions, option
from steer_service.formats.layouts.stored_array import StoredArray, described

EXPECTED = "expected one vector, rows by layer, a dict of vectors by layer, or another layout of docs/vector_files.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """What a layout is read from."""

    path: Path
    """The file, or the folder of a sparse autoencoder."""
    container: str
    """The kind of its container: torch, safetensors, numpy, json."""
    content: Any
    """What `Tree` makes of the content."""
    options: ReadOptions
    """What the user said."""
    config: Mapping[str, Any] | None = None
    """`cfg.json` beside it; None if there is none."""

    def vector_at_layer(self, layer: int, array: StoredArray, kind: str, found: str, model_hint: str = "") -> Imported:
        """The result of a file with one vector; `found` says where the layer is from."""
        return self.vectors({layer: array.only_vector()}, kind, f"layer {layer}, {found}", model_hint)

    def vectors(
        self, vectors: Mapping[int, Float32Array], kind: str, found: str = "", model_hint: str = ""
    ) -> Imported:
        """The result of a file with these vectors; raises InvalidRequest if they do not fit each other or the model."""
        for layer, vector in vectors.items():
            self._check(layer, vector)
        if not any(vector.any() for vector in vectors.values()):
            raise bad("every vector is zero")
        check_same_size(vectors)
        ordered = {layer: vectors[layer] for layer in sorted(vectors)}
        return Imported(layers=ordered, kind=kind, found=found, model_hint=model_hint)

    def operations(self, operations: Mapping[int, tuple[SteeringOp, ...]], kind: str, found: str = "") -> Imported:
        """The result of a file with these operations; raises InvalidRequest if they do not fit."""
        every: dict[int, Float32Array] = {}
        for layer, of_layer in operations.items():
            for operation in of_layer:
                self._check(layer, operation.vector)
                every[len(every)] = operation.vector
        check_same_size(every)
        ordered = {layer: operations[layer] for layer in sorted(operations)}
        return Imported(layers={}, operations=ordered, kind=kind, found=found)

    def chosen(self, vectors: Mapping[int, Float32Array]) -> Mapping[int, Float32Array]:
        """The vectors of the layer that the options name; all without it."""
        layer = self.options.layer
        if layer is None:
            return vectors
        if layer not in vectors:
            raise InvalidRequest(f"there is no vector for layer {layer}", reason="UNKNOWN_LAYER", field="layer")
        return {layer: vectors[layer]}

    def _check(self, layer: int, vector: Float32Array) -> None:
        count, size = self.options.layer_count, self.options.hidden_size
        with within(f"layers[{layer}]"):
            check_layer(layer, MAX_LAYER_INDEX if count is None else count - 1)
            if size is not None and vector.size != size:
                raise InvalidRequest(
                    f"the vector has {vector.size} numbers and the model's hidden size is {size}", reason="WRONG_WIDTH"
                )

    def unknown(self, expected: str = EXPECTED) -> InvalidRequest:
        """The error for content that no layout reads, with the lines that build a spec of it."""
        return InvalidRequest(
            f"this is no known layout of steering vectors; {expected}. These lines steer with any vector of it:\n"
            f"{_READ[self.container].format(name=self.path.name)}\n"
            "    vector = content[...]  # choose one, of shape [hidden_size]\n"
            "    spec = SteeringSpec.simple_add(layer, vector, scale=1.0)  # after decoder layer `layer`, from 0",
            reason="UNKNOWN_LAYOUT",
            field="path",
        )


_READ = {
    "torch": '    content = torch.load("{name}", weights_only=True)',
    "safetensors": '    content = safetensors.numpy.load_file("{name}")',
    "numpy": '    content = numpy.load("{name}")',
    "json": '    content = json.load(open("{name}"))',
}
"""Container -> the line that reads it."""


def needs(name: str, why: str) -> InvalidRequest:
    """The error for a file that can be read once the user gives an option; `why` says what is not known."""
    return InvalidRequest(f"{why}; {option(name)} says it", reason="NEEDS_OPTION", field=name)


def bad(message: str) -> InvalidRequest:
    """The error for a file of a known layout that breaks its rules."""
    return InvalidRequest(message, reason="UNKNOWN_LAYOUT", field="path")


@contextmanager
def naming(path: Path, content: Any = None) -> Iterator[None]:
    """Puts the name of the file, what it holds and the place in it before the message of any error raised inside."""
    try:
        yield
    except SteerError as error:
        place = "" if error.is_place_in_message else _place_of(error)
        holds = "" if content is None else f" holds {described(content)}"
        name = path.name[:80]
        if holds or place or name not in error.message:
            error.message = f"{name}{holds}: {place}{error.message}"
            error.args = (error.message,)
        error.is_place_in_message = True
        raise


def _place_of(error: SteerError) -> str:
    """The field as the user of a file knows it: a place in the file, or an option; "" if the message has the option."""
    *places, name = error.field.split(".")
    if name in OPTIONS:
        places += [] if option(name)[: len(name) + 2] in error.message else [option(name)]
    elif name not in ("path", "directory", "layers", "steering", ""):
        places.append(name)
    return f"{'.'.join(places)}: " if places else ""
