"""Who may import whom, and what the packages bring in by themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
HEAVY = ("torch", "vllm", "transformers", "numba", "triton", "gguf")
"""What a client must not pay for."""


def test_folders_import_downwards_and_each_dependency_is_imported_in_one_folder() -> None:
    if not LINT_IMPORTS.exists():
        pytest.skip("import-linter is not installed")
    answer = subprocess.run(
        [LINT_IMPORTS, "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    "module",
    [
        "steer_service",
        "steer_client",
        "steer_service.testing.fake_backend",
        "steer_service.wire.request",
        "steer_service.server.app",
        "steer_service.cli.capture.command",
        "steer_service.cli.main",
        "steer_service.cli.demo",
        "steer_service.cli.generate",
        "steer_service.cli.serve",
        "steer_service.formats.capture_dataset",
        "steer_service.formats.vector_files",
        "steer_service.hf.bundled_model",
    ],
)
def test_importing_brings_in_nothing_heavy(module: str) -> None:
    program = f"import json, sys, {module}; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(answer.stdout) == []
