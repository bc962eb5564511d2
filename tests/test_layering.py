"""Who may import whom, and what the packages bring in by themselves."""

import json
import re
import subprocess
import sys
import tomllib
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


def test_no_file_of_the_product_has_more_than_450_lines() -> None:
    files = [path for top in ("steer_service", "steer_client") for path in (ROOT / top).rglob("*.py")]
    lengths = {path: path.read_text().count("\n") for path in files if "_pb2" not in path.name}
    assert {path: length for path, length in lengths.items() if length > 450} == {}


def test_every_file_that_imports_vllm_says_what_it_relies_on_and_which_test_notices_a_change() -> None:
    for path in (ROOT / "steer_service" / "engine").rglob("*.py"):
        source = path.read_text()
        if re.search(r"^ *(from|import) vllm\b", source, re.MULTILINE):
            said = " ".join(source.split())
            assert re.search(r"[Rr]elies on", said), path
            assert re.search(r"vLLM,? 0\.24 to 0\.33", said), path
            assert re.search(r"notices? (a change|it)", said), path


def test_the_page_on_the_architecture_names_every_package_whose_imports_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    checked = {name for one in contracts for name in one.get("forbidden_modules", ()) if "steer_" not in name}
    page = (ROOT / "docs" / "architecture.md").read_text().split("\n## Import order\n")[1].split("\n## ")[0]
    assert {name for name in checked if not re.match(r"grpc_", name)} - set(re.findall(r"`(\w+)`", page)) == set()


def test_the_page_on_the_tests_names_every_mark_and_every_helper_of_the_folder() -> None:
    page = (ROOT / "tests" / "README.md").read_text()
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    helpers = {path.name for path in (ROOT / "tests").glob("[a-z]*.py")}
    names = {re.split(r"[(:]", mark)[0] for mark in marks} | {name for name in helpers if not name.startswith("test_")}
    assert names - set(re.findall(r"[\w.]+", page)) == set()


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
