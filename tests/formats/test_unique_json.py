"""A name that is twice in a file of JSON is refused with its name: which of both values was meant, nobody knows."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.formats.checkpoint import DOCUMENT, load_spec
from steer_service.formats.spec_json import spec_from_text
from steer_service.formats.unique_json import parse_json
from steer_service.formats.vector_files import write_vectors
from tests.formats.layouts.files import refusal, rows, write


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "b": 2}', '[{"c": {"a": 1, "b": 2, "b": 3}}]'])
def test_a_name_that_is_twice_is_refused_and_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="the name 'b' is twice in one object") as refused:
        parse_json(text, field="place")
    assert (refused.value.reason, refused.value.field) == ("BAD_JSON", "place")


def test_other_json_is_parsed_as_it_is() -> None:
    content = {"a": [1, {"a": 2.5, "b": None}], "b": {"a": "x"}}
    assert parse_json(json.dumps(content), field="place") == content
    with pytest.raises(ValueError, match="Expecting"):
        parse_json("{", field="place")


def test_every_file_of_json_is_read_in_this_way(tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.json"
    vectors.write_text('{"layer_3": [1, 2], "layer_3": [3, 4]}')
    assert "vectors.json: the name 'layer_3' is twice" in refusal(vectors, "BAD_JSON")
    direction = write(tmp_path / "direction.pt", rows())
    (tmp_path / "direction_metadata.json").write_text('{"layer": 3, "layer": 4}')
    assert "the name 'layer' is twice" in refusal(direction, "BAD_JSON")
    (tmp_path / "sae").mkdir()
    decoder = write(tmp_path / "sae" / "sae.safetensors", {"W_dec": rows(9)})
    (tmp_path / "sae" / "cfg.json").write_text('{"hook_name": "blocks.3.hook_out", "hook_name": "x"}')
    assert "the name 'hook_name' is twice" in refusal(decoder, "BAD_JSON", feature=1)
    with pytest.raises(InvalidRequest, match="the name 'layers' is twice"):
        spec_from_text('{"layers": {}, "layers": {}}')
    (tmp_path / DOCUMENT).write_text('{"format": "x", "format": "y"}')
    with pytest.raises(InvalidRequest, match="the name 'format' is twice"):
        load_spec(tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # zipfile's, of the file that is made here
def test_an_archive_with_an_array_twice_is_refused_and_the_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", layer_3=rows(), layer_4=rows())
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("layer_3.npy", archive.read("layer_4.npy"))
    assert "the array 'layer_3' is there twice" in refusal(tmp_path / "x.npz", "BAD_TENSORS")


def test_a_control_vector_with_a_direction_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_vectors(path, {12: rows(), 13: rows() + 1}, kind="gguf")
    path.write_bytes(path.read_bytes().replace(b"direction.12", b"direction.13"))
    refusal(path, "BAD_GGUF")
