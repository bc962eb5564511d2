"""Arrays: one vector, rows by layer, and rows by position and layer. Nothing about their layers is guessed.

* **vector**, shape [hidden_size]: the layer is in the option `layer`, in the name of the file, or, for the
  `direction.pt` of refusal_direction, in `direction_metadata.json` beside it. CAA saves `vec_layer_{layer}_{model}.pt`,
  a difference of outputs of decoder layer `layer`, counted from 0 (behaviors.py, `get_vector_path`;
  generate_vectors.py).
* **rows**, shape [rows, hidden_size]: with as many rows as the model has layers, row L is after layer L; with one more,
  row 0 is the embeddings, as in `hidden_states`. If the number of layers is not known, the option `rows` decides.
* **refusal-direction**, shape [positions, layers, hidden_size]: refusal_direction saves `mean_diffs.pt` with the
  *input* of layer I at [:, I] (pipeline/submodules/generate_directions.py hooks the layers' inputs), which is the
  stream after layer I - 1. `direction_metadata.json` has the same I as `layer` (pipeline/run_pipeline.py adds the
  direction to the input of `model_block_modules[layer]`).
"""

from pathlib import Path
from typing import Any

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import is_integer
from steer_service.core.number_limits import MAX_LAYERS
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.layouts.layer_names import embeddings, layer_of_file_name
from steer_service.formats.layouts.open_file import OpenFile, bad, needs
from steer_service.formats.layouts.read_options import RowOrder
from steer_service.formats.layouts.stored_array import StoredArray
from steer_service.formats.unique_json import parse_json

METADATA = "direction_metadata.json"
MEAN_DIFFS = "mean_diffs"


def array_layout(file: OpenFile, array: StoredArray, *, order: RowOrder | None = None, hint: str = "") -> Imported:
    """The vectors of an array; `order` is that of a project whose files say which it is."""
    if array.is_one_vector:
        return one_vector(file, array, hint=hint)
    if len(array.shape) == 2:
        file.options.check_used("rows", "layer")
        return _rows(file, array, (), order, hint)
    if len(array.shape) == 3:
        file.options.check_used("position", "rows", "layer")
        return _rows(file, array, (_position(file, array.shape[0]),), _order_of_positions(file, order), hint)
    raise file.unknown(
        "expected an array of shape [hidden_size], [rows, hidden_size] or [positions, rows, hidden_size]"
    )


def one_vector(file: OpenFile, array: StoredArray, *, layer: int | None = None, hint: str = "") -> Imported:
    """A file with one vector; `layer` is what the file itself says."""
    file.options.check_used("layer")
    if file.options.layer is not None:
        return file.vector_at_layer(file.options.layer, array, "vector", "as the option says", hint)
    if layer is not None:
        return file.vector_at_layer(layer, array, "vector", "as the file says", hint)
    if file.path.stem == "direction" and (file.path.parent / METADATA).is_file():
        layer = _layer_of_metadata(file.path.parent / METADATA)
        return file.vector_at_layer(layer, array, "refusal-direction", f"from {METADATA}: it names the layer's input")
    layer = layer_of_file_name(file.path.name)
    if layer is None:
        raise needs("layer", "the layer of its one vector is neither in the file nor in its name")
    return file.vector_at_layer(layer, array, "vector", "from the name of the file", hint)


def _layer_of_metadata(path: Path) -> int:
    try:
        layer: Any = parse_json(path.read_bytes(), field="path")["layer"]
    except InvalidRequest:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise bad(f"{METADATA} beside it has no layer") from error
    if not is_integer(layer) or not 0 <= layer <= MAX_LAYERS:
        raise bad(f"{METADATA} beside it has the layer {layer!r:.40}")
    if layer == 0:
        raise embeddings(f"layer 0 in {METADATA}")
    return int(layer) - 1


def _position(file: OpenFile, count: int) -> int:
    position = file.options.position
    if position is None and count == 1:
        return 0
    if position is None:
        raise needs("position", f"it has vectors of {count} positions")
    if not -count <= position < count:
        raise InvalidRequest(
            f"position {position} is outside {-count}..{count - 1}", reason="OUT_OF_RANGE", field="position"
        )
    return position % count


def _order_of_positions(file: OpenFile, order: RowOrder | None) -> RowOrder | None:
    """As many rows as layers may be the layers' inputs or their outputs, so the number decides nothing here."""
    if order is None and file.options.rows is None and file.path.stem == MEAN_DIFFS:
        return RowOrder.EMBEDDINGS_FIRST
    if order is None and file.options.rows is None and file.content.shape[1] != (file.options.layer_count or -1) + 1:
        raise needs("rows", "row L of each position may be after layer L (after-layer) or its input (embeddings-first)")
    return order


def _rows(file: OpenFile, array: StoredArray, before: tuple[int, ...], order: RowOrder | None, hint: str) -> Imported:
    rows, size = array.shape[-2:]
    if rows > MAX_LAYERS + 1:
        raise bad(f"{rows} rows are more than the layers of any model; --feature reads one row of a decoder")
    if file.options.hidden_size not in (None, size):
        raise InvalidRequest(
            f"its rows have {size} numbers and the model's hidden size is {file.options.hidden_size}",
            reason="WRONG_WIDTH",
            field="path",
        )
    order, found = _order(file, rows, order)
    if file.options.rows is None and found.startswith(RowOrder.AFTER_LAYER.value):
        _check_first_row(array, before)
    first = 1 if order is RowOrder.EMBEDDINGS_FIRST else 0
    vectors: dict[int, Float32Array] = {}
    for row in range(first, rows):
        if file.options.layer in (None, row - first):
            with within(f"rows[{row}]"):
                vectors[row - first] = array.vector(*before, row)
    vectors = {layer: vector for layer, vector in file.chosen(vectors).items() if vector.any()}
    if not vectors:
        raise bad("every vector is zero")
    kind = "persona" if order is RowOrder.EMBEDDINGS_FIRST else "rows"
    if before and file.path.stem == MEAN_DIFFS:
        kind = "refusal-direction"
    return file.vectors(vectors, kind, found, hint)


def _check_first_row(array: StoredArray, before: tuple[int, ...]) -> None:
    """Raises InvalidRequest where the number of rows says after-layer, and row 0 may be the embeddings.

    A persona file without rows for the last layers, as `write_vectors` makes one, may have as many rows as layers. Its
    row 0 is zeros.
    """
    with within("rows[0]"):
        is_doubtful = not array.vector(*before, 0).any()
    if is_doubtful and array.shape[-2] > 1:
        raise needs(
            "rows", "row 0 is zeros: it may be layer 0, or the embeddings with rows for the last layers left out"
        )


def _order(file: OpenFile, rows: int, known: RowOrder | None) -> tuple[RowOrder, str]:
    """(order of the rows, where it is from); raises InvalidRequest where nothing says it, or where it does not fit."""
    count = file.options.layer_count
    order, why = (file.options.rows, "as the option says") if file.options.rows else (known, "as its project writes it")
    if order is not None:
        most = count if count is None else count + (order is RowOrder.EMBEDDINGS_FIRST)
        if most is not None and rows > most:
            raise _wrong_count(rows, count, f"{order.value} has at most {most} rows")
        if known is not None and count is not None and file.options.rows is None and rows != count and rows != most:
            raise _wrong_count(rows, count, f"{order.value} has {most} rows")
        return order, why
    if count is None:
        raise InvalidRequest(
            f"row L of its {rows} may be after layer L, or after layer L - 1 with the embeddings first; --layer-count "
            "(layer_count=), the number of decoder layers of the model, or --rows after-layer|embeddings-first (rows=) "
            "says it",
            reason="NEEDS_OPTION",
            field="rows",
        )
    if rows not in (count, count + 1):
        raise _wrong_count(
            rows, count, f"expected {count}, one after each layer, or {count + 1} with the embeddings first"
        )
    order = RowOrder.AFTER_LAYER if rows == count else RowOrder.EMBEDDINGS_FIRST
    return order, f"{order.value}: {rows} rows for {count} layers"


def _wrong_count(rows: int, count: int | None, rule: str) -> InvalidRequest:
    return InvalidRequest(
        f"it has {rows} rows and the model {count} layers; {rule}; --rows after-layer|embeddings-first (rows=) and "
        "--layer-count (layer_count=) decide",
        reason="WRONG_LAYER_COUNT",
        field="rows",
    )
