"""Steering that `steer train` made of the bundled model, served by `steer serve` on vLLM."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient
from steer_service.cli.server_process import ServerProcess
from steer_service.directions.contrast import read_contrast, split_pairs
from steer_service.directions.sweep import sweep_scales, target_log_probabilities
from steer_service.directions.targets import targets_of
from steer_service.formats.checkpoint import load_spec, read_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.extended]

CONTRAST = Path(__file__).with_name("contrast.jsonl")
LEARNED, HELD_OUT = split_pairs(read_contrast(CONTRAST), held_out=0.5)
FLAGS = ["--max-model-len", "512", "--kv-cache-memory-bytes", str(256 << 20)]


def steer_train(out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "steer_service.cli", "train", str(CONTRAST), "--out", str(out)]
    subprocess.run([*command, "--held-out", "0.5", *arguments], check=True, stdin=subprocess.DEVNULL)


async def test_what_was_trained_raises_the_held_out_targets_of_a_server(tmp_path: Path) -> None:
    assert len(LEARNED) == 20
    steer_train(
        tmp_path / "trained", "--method", "gradient", "--layers", "14", "--epochs", "6", "--batch-size", "20",
        "--learning-rate", "0.1", "--scales=1",
    )  # fmt: skip
    before, after = read_checkpoint(tmp_path / "trained").about["loss"]
    assert after < before
    async with ServerProcess(FLAGS) as server:
        await server.wait_until_serving()
        async with await AsyncSteerClient.connect(server.address) as client:
            spec = load_spec(tmp_path / "trained", model=client.info)
            measure = partial(target_log_probabilities, client, targets_of(HELD_OUT))
            (point,) = await sweep_scales(measure, lambda _: spec, [1.0])
            print(json.dumps({"raised": point.raised, "mean": point.mean, "unsteered": (await measure(None)).mean()}))
            assert point.raised >= 0.9
        steer_train(tmp_path / "found", "--address", server.address, "--scales=1")
    about = read_checkpoint(tmp_path / "found").about
    print(json.dumps(about))
    assert about["held_out"]["auc"] >= 0.9
