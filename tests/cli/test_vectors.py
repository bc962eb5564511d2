"""`steer vectors inspect` and `convert` as a user meets them; `sweep` is tested with `steer train`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from steer_service.cli.main import main
from steer_service.core.backend import ModelInfo
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.formats.checkpoint import load_spec, read_checkpoint, save_spec
from steer_service.formats.layer_vectors import CONVENTIONS
from steer_service.formats.vector_files import WRITERS, read_vectors, write_vectors

WIDTH = 8
VECTORS = {layer: np.random.default_rng(layer).normal(size=WIDTH).astype(np.float32) for layer in (1, 4)}
MODEL = ModelInfo(
    name="small", architecture="Small", layer_count=6, hidden_size=WIDTH, vocab_size=10, max_model_len=16,
    dtype="float32", max_programs=1, max_operations=8, max_operations_per_layer=8,
)  # fmt: skip

Output = pytest.CaptureFixture[str]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "vectors.gguf"
    write_vectors(path, VECTORS, kind="gguf", model_hint="llama")
    return path


def test_inspect_says_what_a_file_holds_and_what_its_layers_are(gguf: Path, capsys: Output) -> None:
    assert main(["vectors", "inspect", str(gguf)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["kind    gguf", f"layers  {CONVENTIONS['gguf']}", "model   llama"]
    assert [line.split() for line in lines[-2:]] == [
        [str(layer), "8", f"{np.linalg.norm(vector):.4g}", f"{np.abs(vector).max():.4g}"]
        for layer, vector in VECTORS.items()
    ]


def test_inspect_says_which_operations_a_folder_holds(tmp_path: Path, capsys: Output) -> None:
    operations = [
        AddSpec([2.0] + [0.0] * 7, 0.5),
        ProjectionCapSpec(VECTORS[1], max=1.5),
        AblationSpec(VECTORS[4], -0.25),
    ]
    spec = SteeringSpec({2: LayerSteeringSpec(operations)})
    save_spec(tmp_path / "out", spec, model=MODEL, revision="1f3a", about={"why": "a test"})
    assert main(["vectors", "inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for said in ("small, hidden size 8, 6 layers", "1f3a", spec.digest(), '{"why": "a test"}'):
        assert said in printed
    shown = [line.split(maxsplit=3) for line in printed.splitlines()[-3:]]
    assert [line[:2] for line in shown] == [["2", "add"], ["2", "cap"], ["2", "ablation"]]
    assert shown[0][2:] == ["2", "scale 0.5"]
    assert [line[3] for line in shown[1:]] == ["max 1.5", "scale -0.25"]


@pytest.mark.parametrize("kind", WRITERS)
def test_convert_writes_the_same_vectors_as_another_kind(gguf: Path, tmp_path: Path, capsys: Output, kind: str) -> None:
    suffix = {"gguf": ".gguf", "safetensors": ".safetensors"}.get(kind, ".pt")
    out = tmp_path / f"other{suffix}"
    assert main(["vectors", "convert", str(gguf), str(out), "--to", kind, "--scale", "2"]) == 0
    said = capsys.readouterr().err
    assert CONVENTIONS["gguf"] in said
    assert CONVENTIONS[kind] in said
    found = read_vectors(out, kind=kind)
    assert found.kind == kind
    assert found.layers.keys() == VECTORS.keys()
    for layer, vector in found.layers.items():
        np.testing.assert_array_equal(vector, 2 * VECTORS[layer])


def test_convert_makes_a_folder_that_steers_any_model_of_its_width_unless_it_is_named(
    gguf: Path, tmp_path: Path
) -> None:
    assert main(["vectors", "convert", str(gguf), str(tmp_path / "any"), "--layers", "4"]) == 0
    assert read_checkpoint(tmp_path / "any").model.name == ""  # `llama` is a type and no model's name
    spec = load_spec(tmp_path / "any", model=MODEL)
    assert list(spec.layers) == [4]
    np.testing.assert_allclose(spec.layers[4].operations[0].materialize(), VECTORS[4], rtol=1e-6)
    assert main(["vectors", "convert", str(tmp_path / "any"), str(tmp_path / "named"), "--model-name", "small"]) == 0
    assert main(["vectors", "convert", str(tmp_path / "named"), str(tmp_path / "again")]) == 0
    assert read_checkpoint(tmp_path / "again").model.name == "small"


def test_convert_reads_what_only_its_user_can_name(tmp_path: Path) -> None:
    path = tmp_path / "vectors.pt"
    torch.save({"layer_activations": {3: torch.ones(WIDTH)}}, path)
    assert main(["vectors", "convert", str(path), str(tmp_path / "a.gguf"), "--from", "steering-vectors"]) == 0
    assert list(read_vectors(tmp_path / "a.gguf").layers) == [3]


def test_rows_by_layer_are_read_in_the_order_that_is_said(tmp_path: Path, capsys: Output) -> None:
    axis = np.random.default_rng(0).normal(size=(30, WIDTH)).astype(np.float32)
    torch.save(torch.from_numpy(axis), tmp_path / "axis.pt")
    assert main(["vectors", "inspect", str(tmp_path / "axis.pt")]) == 2
    assert "--rows after-layer|embeddings-first" in capsys.readouterr().err
    for said, row in ((["--rows", "embeddings-first"], 22), (["--layer-count", "30"], 21)):
        out = tmp_path / "out.safetensors"
        arguments = [str(tmp_path / "axis.pt"), str(out), "--layer", "21", *said, "--overwrite"]
        assert main(["vectors", "convert", *arguments]) == 0
        np.testing.assert_array_equal(read_vectors(out).layers[21], axis[row])


def test_caps_are_shown_and_converted_to_a_folder_only(tmp_path: Path, capsys: Output) -> None:
    caps = {"vectors": {"n": {"layer": 5, "vector": torch.ones(WIDTH)}},
            "experiments": [{"id": "e", "interventions": [{"vector": "n", "cap": 1.5}]}]}  # fmt: skip
    torch.save(caps, tmp_path / "caps.pt")
    assert main(["vectors", "inspect", str(tmp_path / "caps.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["5", "cap", "2.828", "max", "1.5"]
    assert main(["vectors", "convert", str(tmp_path / "caps.pt"), str(tmp_path / "out.gguf")]) == 2
    assert "--to trained-steering has them" in capsys.readouterr().err
    assert main(["vectors", "convert", str(tmp_path / "caps.pt"), str(tmp_path / "out")]) == 0
    assert load_spec(tmp_path / "out").layers[5].operations == (ProjectionCapSpec([1.0] * WIDTH, max=1.5),)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["convert", "{gguf}", "{folder}/out.npy"], 2, "--to chooses the kind"),
        (["convert", "{gguf}", "{gguf}"], 2, "--overwrite replaces it"),
        (["convert", "{gguf}", "{folder}", "--overwrite", "--to", "gguf"], 2, "is a folder"),
        (["convert", "{gguf}", "{folder}/nowhere/out.gguf"], 2, "is not a folder"),
        (["convert", "{gguf}", "{folder}/out.pt", "--layers", "1,3"], 2, "has no vector for layer 3"),
        (["convert", "{gguf}", "{folder}/out.pt", "--from", "persona"], 2, "it is read as gguf, not persona"),
        (["convert", "{folder}/nothing.gguf", "{folder}/out.pt"], 2, "there is no nothing.gguf"),
        (["convert", "{gguf}", "{folder}/out.pt", "--scale", "inf"], 2, "--scale: inf is not finite"),
        (["inspect", "{folder}/nothing.gguf"], 2, "there is no nothing.gguf"),
        (["inspect", "{folder}", "--from", "checkpoint"], 2, "this is no trained steering"),
        (["sweep", "{gguf}", "{folder}/nothing.jsonl"], 2, "nothing.jsonl is not a file"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_nothing_is_written(
    gguf: Path, tmp_path: Path, capsys: Output, arguments: list[str], status: int, message: str
) -> None:
    before = gguf.read_bytes()
    given = [argument.format(gguf=gguf, folder=tmp_path) for argument in arguments]
    assert main(["vectors", *given]) == status
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [gguf]
    assert gguf.read_bytes() == before


@pytest.mark.parametrize("content", [b"no vectors", b'{"layer_3": [1, 2], "layer_3": [1, 2]}', b"\x93NUMPY\x01\x00"])
def test_a_bad_file_ends_every_command_with_2_and_a_line_that_begins_with_its_name(
    content: bytes, tmp_path: Path, capsys: Output
) -> None:
    path, contrast = tmp_path / "bad.npy", tmp_path / "contrast.jsonl"
    path.write_bytes(content)
    contrast.write_text('{"positive": "It is good.", "negative": "It is bad."}\n')
    for arguments in (
        ["vectors", "inspect", path],
        ["vectors", "convert", path, tmp_path / "out.gguf"],
        ["vectors", "sweep", path, contrast],
        ["generate", "hello", "--steering", path, "--address", f"unix:{tmp_path}/none.sock"],
    ):
        assert main(list(map(str, arguments))) == 2
        assert capsys.readouterr().err.startswith("steer: bad.npy")


@pytest.mark.parametrize(
    ("layer", "out", "scale", "message"),
    [
        (0, "x.gguf", 1, "a control vector has no direction for layer 0"),
        (1, "folder", 2, "scale 2 is for additions"),
    ],
)
def test_what_a_kind_cannot_hold_ends_with_2(
    layer: int, out: str, scale: int, message: str, tmp_path: Path, capsys: Output
) -> None:
    path = tmp_path / "in.pt"
    cap = {"action": "clamp", "steering_vector": torch.ones(WIDTH)}
    torch.save({f"layers.{layer}": cap} if scale != 1 else {layer: torch.ones(WIDTH)}, path)
    assert main(["vectors", "convert", str(path), str(tmp_path / out), "--scale", str(scale)]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("steer: in.pt: ")
    assert message in printed
    assert list(tmp_path.iterdir()) == [path]


def test_trained_steering_takes_no_option_of_a_file_of_vectors(tmp_path: Path, capsys: Output) -> None:
    save_spec(tmp_path, SteeringSpec.simple_add(2, VECTORS[1]), model=MODEL)
    assert main(["vectors", "inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("kind      trained-steering\n")
    assert main(["vectors", "inspect", str(tmp_path), "--layer", "2"]) == 2
    assert "--layer: trained steering says all of its layers" in capsys.readouterr().err
