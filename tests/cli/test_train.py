"""`steer train` and `steer vectors sweep` as a user meets them, on the tiny Llama, here and behind a server."""

# ruff: noqa: F811  (a fixture of the client's tests)

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from steer_service.cli.arguments import layers_from, layers_text
from steer_service.cli.main import main
from steer_service.directions.contrast import read_contrast, split_pairs
from steer_service.directions.directions import Method, find_direction
from steer_service.directions.rows import collect_rows
from steer_service.directions.targets import targets_of
from steer_service.directions.training import log_probabilities
from steer_service.formats.checkpoint import load_spec, read_checkpoint
from steer_service.formats.vector_files import read_vectors
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.client.conftest import dead_address  # noqa: F401  (a fixture)
from tests.tiny_models import LAYERS, ModelFolder

PNG = b"\x89PNG\r\n\x1a\n"
THINGS = ("cat", "dog", "house", "river", "king", "letter", "door", "song", "night", "teacher", "road", "field")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contrast") / "contrast.jsonl"
    lines = [{"positive": f"The {it} was wonderful.", "negative": f"The {it} was terrible."} for it in THINGS]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def steer(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed and returns what it printed."""

    def run(*arguments: object) -> str:
        status = main(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


def columns(printed: str, head: str) -> dict[str, list[str]]:
    """The first column of a table whose head begins with this word -> the others."""
    lines = [line.split() for line in printed.splitlines()]
    first = next(index for index, line in enumerate(lines) if line[:1] == [head])
    return {line[0]: line[1:] for line in lines[first + 1 :] if len(line) == len(lines[first])}


async def found_by_hand(hf: HFSteeringModel, contrast: Path, method: Method, layer: int) -> np.ndarray:
    learned, _ = split_pairs(read_contrast(contrast))
    sides = [
        (await collect_rows(hf, [getattr(pair, side) for pair in learned], [layer]))[layer]
        for side in ("positive", "negative")
    ]
    return find_direction(method, layer, *sides).vector


@pytest.fixture(scope="module")
def hf(model_folder: ModelFolder):
    with HFSteeringModel(model_folder("llama"), dtype=torch.float32) as model:
        yield model


@pytest.mark.parametrize("method", Method)
def test_a_direction_of_the_best_layer_is_saved_with_what_it_is_worth(
    steer: Run, hf: HFSteeringModel, contrast: Path, tmp_path: Path, method: Method
) -> None:
    out = tmp_path / "out"
    printed = steer("train", contrast, "--method", method.value, "--model", hf.model_name, "--out", out, "--scales=0,1")
    checkpoint = read_checkpoint(out, model=hf.info)
    (layer,) = checkpoint.spec.layers
    want = asyncio.run(found_by_hand(hf, contrast, method, layer))
    (operation,) = checkpoint.spec.layers[layer].operations
    np.testing.assert_allclose(operation.materialize(), want, rtol=1e-4, atol=1e-5)
    assert checkpoint.about["method"] == method.value
    assert checkpoint.about["pairs"] == {"learned": 9, "held_out": 3, "seed": 0}
    scores = columns(printed, "layer")
    assert list(scores) == [str(layer) for layer in range(LAYERS)]
    assert scores[str(layer)][0] == f"{checkpoint.about['held_out']['auc']:.3f}"
    assert list(read_vectors(out / "directions.safetensors").layers) == list(range(LAYERS))
    for plot in ("scores.png", "sweep.png"):
        assert (out / plot).read_bytes().startswith(PNG)
    targets = targets_of(split_pairs(read_contrast(contrast))[1])
    swept = columns(printed, "scale")
    assert float(swept["0"][0]) == pytest.approx(log_probabilities(hf, targets).mean(), abs=1e-3)
    steered = log_probabilities(hf, targets, load_spec(out))
    assert float(swept["1"][0]) == pytest.approx(steered.mean(), abs=1e-3)


def test_training_by_gradient_saves_what_raises_the_targets(
    steer: Run, hf: HFSteeringModel, contrast: Path, tmp_path: Path
) -> None:
    steer("train", contrast, "--method", "gradient", "--model", hf.model_name, "--layers", 2, "--epochs", 8,
          "--out", tmp_path, "--scales=1")  # fmt: skip
    checkpoint = read_checkpoint(tmp_path, model=hf.info)
    assert list(checkpoint.trained or ()) == [2]
    first, last = checkpoint.about["loss"]
    assert last < first
    targets = targets_of(split_pairs(read_contrast(contrast))[1])
    assert (log_probabilities(hf, targets, checkpoint.spec) > log_probabilities(hf, targets)).all()


@pytest.fixture(scope="module")
def address(model_folder: ModelFolder) -> Iterator[str]:
    """Of a server of the tiny Llama."""
    loop, server = EventLoopThread("test-server"), SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    loop.run(server.listen())
    loop.run(server.open(HFSteeringModel(model_folder("llama"), name="tiny", dtype=torch.float32)))
    yield server.address
    loop.run(server.drain())
    loop.stop()


def test_a_server_s_model_is_as_good_as_one_that_is_loaded_here(
    steer: Run,
    address: str,
    hf: HFSteeringModel,
    contrast: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ("--rows", "mean-generated", "--max-tokens", 4, "--layers", "1,3", "--scales=-1,1")
    served = steer("train", contrast, "--address", address, "--out", tmp_path / "served", *chosen)
    here = steer("train", contrast, "--model", hf.model_name, "--out", tmp_path / "here", *chosen)
    for layer, vector in read_vectors(tmp_path / "here" / "directions.safetensors").layers.items():
        np.testing.assert_allclose(
            read_vectors(tmp_path / "served" / "directions.safetensors").layers[layer], vector, rtol=1e-3, atol=1e-5
        )
    assert read_checkpoint(tmp_path / "served").model.name == "tiny"
    swept, measured = columns(served, "scale"), columns(here, "scale")
    assert swept.keys() == measured.keys() == {"-1", "1"}
    for scale, (mean, _) in swept.items():
        assert float(mean) == pytest.approx(float(measured[scale][0]), abs=2e-3)
    plot = tmp_path / "plot.png"
    sweep = ("vectors", "sweep", tmp_path / "here", contrast, "--address", address, "--scales=1", "--plot", plot)
    assert main(list(map(str, sweep))) == 0
    printed = capsys.readouterr()
    assert list(columns(printed.out, "scale")) == ["1"]
    assert re.search(r"^steer: steering layer \d \(addition, .*\), times each scale$", printed.err, re.MULTILINE)
    assert plot.read_bytes().startswith(PNG)


def test_prompts_that_say_nothing_in_common_are_compared_without_a_sweep(
    steer: Run, hf: HFSteeringModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "contrast.jsonl"
    lines = [{"positive": f"Hooray, a {it}!", "negative": f"No more {it}s."} for it in THINGS[:4]]
    path.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["train", str(path), "--model", hf.model_name, "--layers", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "the effect on texts is not measured: pairs[0].positive" in capsys.readouterr().err
    assert list(load_spec(tmp_path / "out").layers) == [1]


def test_given_answers_are_compared_at_a_position_or_over_their_text(
    steer: Run, hf: HFSteeringModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "contrast.jsonl"

    def chat(thing: str, answer: str) -> list[dict[str, str]]:
        question = f"Is a {thing} good? (A) Yes (B) No"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    lines = [{"positive": chat(it, "(A)"), "negative": chat(it, "(B)")} for it in THINGS[:8]]
    path.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["train", path, "--model", hf.model_name, "--layers", 1, "--scales=1"]
    for rows in ("-2", "last-message"):
        steer(*arguments, "--out", tmp_path / rows, "--rows", rows)
        assert str(read_checkpoint(tmp_path / rows).about["rows"]) == rows
    assert load_spec(tmp_path / "-2") != load_spec(tmp_path / "last-message")
    assert main([*map(str, arguments), "--out", str(tmp_path / "out"), "--rows=-999"]) == 1
    assert re.search(r"line \d\.positive\.capture\.positions.*-999", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gradient", "--address", "127.0.0.1:1"], "a server has no gradients"),
        (["--method", "gradient", "--rows", "mean-generated"], "--rows is not for --method gradient"),
        (["--epochs", "3"], "--epochs is not for --method difference"),
        (["--max-tokens", "3"], "--max-tokens needs --rows mean-generated"),
        (["--method", "gradient", "--batch-size", "0"], "--batch-size: 0 is not above 0"),
        (["--address", "127.0.0.1:1", "--dtype", "float32"], "--dtype: a server's model is loaded already"),
        (["--address", "nowhere"], "address"),
        (["--token-file", "x"], "--token-file needs --address"),
        (["--tls"], "--tls needs --address"),
        (["--device", "abacus"], "device: abacus is not a device of torch"),
        (["--scales", "1,big"], "--scales: 'big' is not a number"),
        (["--scales", "inf"], "--scales: inf is not finite"),
        (["--layers", "3-1"], "--layers"),
        (["--rows", "mean"], "rows: 'mean' is not last-prompt, mean-generated, last-message or a position such as -2"),
        (["--held-out", "0.99"], "too few"),
        (["--held-out", "0.8"], "2 training pairs are too few to choose a layer by; 4 are needed"),
        (["--held-out", "0.8", "--layers", "1-2"], "name one layer, such as --layers 12"),
    ],
)
def test_a_wrong_command_line_is_refused_before_any_work(
    contrast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["train", str(contrast), "--out", str(out), *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"positive": "a"}\n{"positive": "b"}', "every line has only positive"),
        ("no JSON", "line 1: not JSON"),
        (
            "I feel great.",
            '; expected a line such as {"positive": "Today I feel great", "negative": "Today I feel grim"}',
        ),
        ("[1]", 'line 1: expected an object such as {"positive": '),
    ],
)
def test_a_wrong_file_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "contrast.jsonl").write_text(content)
    assert main(["train", str(tmp_path / "contrast.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", str(tmp_path / "nothing.jsonl"), "--out", str(tmp_path / "out")]) == 2


def test_what_is_there_is_replaced_only_if_asked(
    steer: Run, hf: HFSteeringModel, contrast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", contrast, "--model", hf.model_name, "--layers", 1, "--scales=1", "--out", tmp_path]
    steer(*arguments)
    before = load_spec(tmp_path)
    assert main([*map(str, arguments), "--method", "pca"]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert load_spec(tmp_path) == before
    steer(*arguments, "--method", "pca", "--overwrite")
    assert load_spec(tmp_path) != before


def test_a_model_or_a_server_that_is_not_there_is_said_in_one_line(
    contrast: Path,
    tmp_path: Path,
    dead_address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    for where in (["--model", str(tmp_path / "nothing")], ["--address", dead_address]):
        assert main(["train", str(contrast), "--out", str(out), *where]) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert not out.exists()


def test_layers_that_the_model_does_not_have_leave_nothing_behind(
    hf: HFSteeringModel, contrast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("difference", "gradient"):
        arguments = ["--method", method, "--layers", "40", "--model", hf.model_name, "--out", str(tmp_path / "out")]
        assert main(["train", str(contrast), *arguments]) == 2
        assert f"steer: --layers: layer 40 is outside 0..{LAYERS - 1}; the model has {LAYERS} layers\n" in (
            capsys.readouterr().err
        )
    assert not (tmp_path / "out").exists()


def test_a_tie_between_layers_is_said_with_what_was_compared(
    hf: HFSteeringModel, contrast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(contrast), "--model", hf.model_name, "--scales=1", "--out", str(tmp_path / "all")]
    assert main(arguments) == 0
    printed = capsys.readouterr().err
    [said] = re.findall(
        rf"warning: (\d) of {LAYERS} layers tie with this AUC: ([\d,-]+)\. Layer (\d) is the one of them nearest to "
        r"the middle of the model\. Only the 9 training pairs count",
        printed,
    )
    tied = layers_from("--layers", said[1])
    assert int(said[0]) == len(tied) > 1
    (layer,) = load_spec(tmp_path / "all").layers
    assert layer == int(said[2]) == min(tied, key=lambda one: abs(one - (LAYERS - 1) / 2))
    assert main([*arguments[:-1], str(tmp_path / "one"), "--layers", str(layer)]) == 0
    assert "warning:" not in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "text"), [((3, 7, 8, 9), "3,7-9"), ((0,), "0"), ((1, 2, 4, 5), "1-2,4-5")])
def test_layers_are_printed_as_they_are_given(layers: tuple[int, ...], text: str) -> None:
    assert layers_text(layers) == text
    assert layers_from("--layers", text) == layers
