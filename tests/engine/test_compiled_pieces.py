"""What vLLM's own backend for graphs, which a GPU has, makes of a model with our hooks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steer_service.engine.worker.hooks import HAS_NAMES

ROOT = Path(__file__).parents[2]


def compiled(cache: Path, layers: int, *, slots: int = 8, with_names: bool = True) -> dict[str, Any]:
    """What `compiled_pieces` says, with vLLM's compile cache in this folder."""
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(cache), "VLLM_USE_LAYERNAME": str(int(with_names))}
    command = [sys.executable, "-m", "tests.engine.compiled_pieces", "--layers", str(layers), "--slots", str(slots)]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    facts: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    assert facts["visited"] == [[*range(layers)]] * 3  # compiled, again, and not compiled: once each, in order
    assert facts["error"] == 0.0
    assert facts["copies"] == []  # the op changes what the layer returned, and no copy of it
    return facts


@pytest.mark.skipif(not HAS_NAMES, reason="torch has no inputs of this kind")
def test_as_many_pieces_are_saved_for_a_deep_model_and_found_by_a_server_with_other_slots(tmp_path: Path) -> None:
    shallow, deep = compiled(tmp_path / "shallow", 4), compiled(tmp_path / "deep", 16)
    again = compiled(tmp_path / "shallow", 4, slots=9)

    assert (shallow["pieces"], deep["pieces"]) == (5, 17)
    assert shallow["saved"] == deep["saved"] <= 4
    assert shallow["hooks"] > 0
    assert (again["compiled"], again["saved"]) == (0, 0)


def test_without_names_each_layer_has_a_piece_of_its_own_and_the_hooks_do_the_same(tmp_path: Path) -> None:
    assert compiled(tmp_path, 6, with_names=False)["saved"] == 7
