"""The compiled kernel's cache: what is damaged, unsafe or full costs a compilation, and never a start."""

import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from steer_service.core import layer_change
from steer_service.ops.kernel_cache import from_cache
from steer_service.ops.plan import build_plan

SOURCES = (layer_change, sys.modules[build_plan.__module__])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    return tmp_path / "numba"


class Compiler:
    """Keeps a pickle, as Numba does, and reads it."""

    def __init__(self) -> None:
        self.folders: list[Path | None] = []
        """Where it was asked to keep what it compiles."""

    def __call__(self, folder: Path | None) -> str:
        self.folders.append(folder)
        if folder is not None:
            kept = folder / "ops" / "kernel.1.nbc"
            if kept.exists():
                return str(pickle.loads(kept.read_bytes()))
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(pickle.dumps("from the cache"))
        return "compiled"


def test_the_second_start_reads_the_cache(folder: Path) -> None:
    assert [from_cache(Compiler(), SOURCES) for _ in range(2)] == ["compiled", "from the cache"]


@pytest.mark.parametrize("damage", [b"", b"garbage", pickle.dumps("whole")[:-3], b"\x80\x04cos\nnone\n."])
def test_a_damaged_file_is_compiled_again_and_replaced(
    folder: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    from_cache(Compiler(), SOURCES)
    (kept,) = folder.rglob("*.nbc")
    kept.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert from_cache(Compiler(), SOURCES) == "compiled"
    assert "since its cache is damaged" in caplog.text
    assert from_cache(Compiler(), SOURCES) == "from the cache"


def test_a_folder_that_others_can_write_to_is_neither_read_nor_written(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from_cache(Compiler(), SOURCES)
    folder.chmod(0o777)
    compiler = Compiler()
    with caplog.at_level(logging.WARNING):
        assert from_cache(compiler, SOURCES) == "compiled"
    assert compiler.folders == [None]
    assert "other users can write to it" in caplog.text
    assert "set STEERLLM_CACHE or NUMBA_CACHE_DIR" in caplog.text


def test_a_disk_that_fills_up_leaves_the_kernel_uncached(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def compile_in(folder: Path | None) -> str:
        if folder is not None:
            raise OSError(28, "No space left on device")
        return "compiled"

    with caplog.at_level(logging.WARNING):
        assert from_cache(compile_in, SOURCES) == "compiled"
    assert "cannot be kept" in caplog.text
    assert "No space left on device" in caplog.text


def test_other_sources_have_another_folder(folder: Path) -> None:
    from_cache(Compiler(), SOURCES)
    assert from_cache(Compiler(), SOURCES[:1]) == "compiled"


SCRIPT = """
from pathlib import Path
import torch
from steer_service.ops import cpu_kernel
KERNELS = "cpu_kernel._hook_float32*.nb?"
before = len(list(Path(cpu_kernel.__file__).parent.rglob(KERNELS)))
cpu_kernel.compiled_kernel(torch.float32)
print(len(list(Path(cpu_kernel.__file__).parent.rglob(KERNELS))) - before)
"""


def test_the_package_folder_gets_no_compiled_kernel(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stderr, done.stdout) == ("", "0\n")
    assert len(list(folder.rglob("cpu_kernel._hook_float32*.nb?"))) == 2
