"""The snippets that users start from, and the command line, on a real model."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from steer_client import AsyncSteerClient, SteerClient
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from tests.real_server.serving import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


class TestQuickStart:
    """The snippets that users start from, on a real model."""

    async def test_basic_steering(self, server: Server) -> None:
        model = AsyncSteerClient(server.address)
        assert model.model_name == "SmolLM2-135M-Instruct"
        direction = torch.randn(model.hidden_size)
        steering = SteeringSpec.simple_add(layer=5, vector=direction, scale=2.0)
        texts, _ = await model.generate(["What is consciousness?"], max_tokens=20, steering_spec=steering)
        assert texts[0]
        await model.close()

    async def test_activation_capture(self, client: AsyncSteerClient) -> None:
        _, handles = await client.generate(
            ["The meaning of life is"], max_tokens=10, ignore_eos=True, capture_layers=[5, 10, 15]
        )
        async with handles[0] as handle:
            await handle.fetch()
            layer_5 = handle.captures[5][0]["hidden"]
            travelled = (await handle.fetch(framework="native"))[5][0]["hidden"]
        assert layer_5.shape == travelled.shape == (5 + 10 - 1, 576)
        assert (layer_5.dtype, travelled.dtype) == (np.float32, ml_dtypes.bfloat16)
        np.testing.assert_array_equal(layer_5, travelled.astype(np.float32))

    async def test_multi_operation_steering(self, client: AsyncSteerClient) -> None:
        steering_direction, cap_direction, ablate_direction = torch.randn(3, client.hidden_size)
        spec = SteeringSpec(
            layers={
                5: LayerSteeringSpec(
                    operations=[
                        AddSpec(vector=steering_direction, scale=2.0),
                        ProjectionCapSpec(vector=cap_direction, min=-1.0, max=1.0),
                    ]
                ),
                10: LayerSteeringSpec(operations=[AblationSpec(vector=ablate_direction, scale=0.0)]),
            }
        )
        results, _ = await client.generate(["One", "Two"], max_tokens=4, steering_spec=spec, raw_output=True)
        assert [result.outputs[0].receipt.steering_digest for result in results] == [spec.digest()] * 2

    async def test_chat(self, client: AsyncSteerClient) -> None:
        messages = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
        responses, handles = await client.chat(messages, max_tokens=20, temperature=0.0, capture_layers=[5])
        assert "Paris" in responses[0].generated
        await handles[0].fetch()
        rows = handles[0].get_message_activations(0, 5)
        assert 0 < len(rows) < len(handles[0].captures[5][0]["hidden"])

    def test_the_sync_client_twice_in_a_row(self, server: Server) -> None:
        with SteerClient(server.address) as client:
            first, _ = client.generate(["The capital of France is"], max_tokens=5, temperature=0.0)
            second, _ = client.generate(["The capital of France is"], max_tokens=5, temperature=0.0)
            streamed = "".join(client.stream("The capital of France is", max_tokens=5, temperature=0.0))
        assert first[0] == second[0] == streamed
        assert "Paris" in streamed


class TestCommandLine:
    def steer(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "steer_service.cli", "generate", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def test_text_steering_and_captures(self, server: Server, tmp_path: Path) -> None:
        np.save(tmp_path / "v.npy", np.ones(576, np.float32))
        steering = {"layers": {"4": [{"op": "add", "vector": {"file": "v.npy"}, "scale": 0.5}]}}
        (tmp_path / "steering.json").write_text(json.dumps(steering))
        done = self.steer(
            *("The capital of France is", "--address", server.address, "--temperature", "0", "--max-tokens", "6"),
            *("--steering", str(tmp_path / "steering.json"), "--capture", "3-5", "--out", str(tmp_path / "c.npz")),
            "--json",
        )
        assert done.returncode == 0, done.stderr
        shown = json.loads(done.stdout.splitlines()[-1])
        assert shown["receipt"]["steered_layers"] == [4]
        arrays = np.load(tmp_path / "c.npz")
        assert arrays["layer_4"].shape == (shown["receipt"]["rows_captured"], 576)

    def test_no_server_is_one_plain_sentence(self) -> None:
        done = self.steer("Hello", "--address", "127.0.0.1:9")
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
