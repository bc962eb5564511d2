"""The snippets that users start from, with only the import line and the model's line changed."""

import asyncio
from dataclasses import replace

import pytest

from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.client.conftest import Serve

DEEP_MODEL = replace(FAKE_MODEL, layer_count=16)


@pytest.fixture
def address(serve: Serve) -> str:
    return serve(FakeBackend(DEEP_MODEL)).address


def test_basic_steering(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    from steer_client import AsyncSteerClient, SteeringSpec

    async def main() -> None:
        model = AsyncSteerClient(address)

        # Create steering spec
        direction = torch.randn(model.hidden_size)
        steering = SteeringSpec.simple_add(layer=5, vector=direction, scale=2.0)

        # Generate with steering
        texts, _ = await model.generate(
            ["What is consciousness?"],
            max_tokens=100,
            steering_spec=steering,
        )
        print(texts[0])

    asyncio.run(main())

    assert len(capsys.readouterr().out.split()) == 100


async def test_activation_capture(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    from steer_client import AsyncSteerClient

    async def capture_example() -> None:
        model = AsyncSteerClient(address)

        texts, handles = await model.generate(  # noqa: RUF059
            ["The meaning of life is"],
            max_tokens=50,
            capture_layers=[5, 10, 15],
        )

        async with handles[0] as handle:
            await handle.fetch()
            layer_5 = handle.captures[5][0]["hidden"]
            print(f"Layer 5 shape: {layer_5.shape}")

    await capture_example()

    assert capsys.readouterr().out == "Layer 5 shape: (54, 8)\n"


async def test_multi_operation_steering(address: str) -> None:
    torch = pytest.importorskip("torch")
    from steer_client import (
        AblationSpec,
        AddSpec,
        AsyncSteerClient,
        LayerSteeringSpec,
        ProjectionCapSpec,
        SteeringSpec,
    )

    model = AsyncSteerClient(address)
    steering_direction, cap_direction, ablate_direction = torch.randn(3, model.hidden_size)
    prompts = ["One prompt", "And another"]

    # Complex steering: add vector, cap projection, ablate direction
    spec = SteeringSpec(layers={
        5: LayerSteeringSpec(operations=[
            AddSpec(vector=steering_direction, scale=2.0),
            ProjectionCapSpec(vector=cap_direction, min=-1.0, max=1.0),
        ]),
        10: LayerSteeringSpec(operations=[
            AblationSpec(vector=ablate_direction, scale=0.0),  # Full removal
        ]),
    })  # fmt: skip

    texts, _ = await model.generate(prompts, steering_spec=spec)

    assert len(texts) == 2
    await model.close()


async def test_steering_operations(serve: Serve) -> None:
    torch = pytest.importorskip("torch")
    from steer_client import AblationSpec, AddSpec, AsyncSteerClient, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec

    raw_vector = unit_vector = direction = torch.randn(8)
    operations = [
        # Create from raw vector (will be normalized, scale captures magnitude)
        AddSpec.from_unnormalized(raw_vector, scale=1.0),
        # Or with explicit unit vector and scale
        AddSpec(vector=unit_vector, scale=2.0),
        # Cap between -1 and 1
        ProjectionCapSpec(vector=direction, min=-1.0, max=1.0),
        # One-sided caps
        ProjectionCapSpec(vector=direction, max=0.5),  # Upper only
        ProjectionCapSpec(vector=direction, min=0.0),  # Lower only
        # Full ablation (remove component)
        AblationSpec(vector=direction, scale=0.0),
        # Partial ablation (reduce by half)
        AblationSpec(vector=direction, scale=0.5),
        # Amplification (double the component)
        AblationSpec(vector=direction, scale=2.0),
    ]
    spec = SteeringSpec(layers={2: LayerSteeringSpec(operations=operations)})
    server = serve()

    async with AsyncSteerClient(server.address) as model:
        await model.generate("Hello", steering_spec=spec, max_tokens=1)

    assert server.backend.requests[0].steering == spec


async def test_convenience_constructors(address: str) -> None:
    torch = pytest.importorskip("torch")
    from steer_client import AsyncSteerClient, SteeringSpec

    model = AsyncSteerClient(address)
    v = torch.randn(model.hidden_size)

    # Simple single-layer steering
    added = SteeringSpec.simple_add(layer=5, vector=v, scale=1.0)
    capped = SteeringSpec.simple_cap(layer=10, vector=v, min=-0.5, max=0.5)
    ablated = SteeringSpec.simple_ablation(layer=15, vector=v, scale=0.0)

    for spec in (added, capped, ablated):
        [generation], _ = await model.generate("Hello", steering_spec=spec, max_tokens=1, raw_output=True)
        assert generation.outputs[0].receipt.steering_digest == spec.digest()
    await model.close()


async def test_chat_style_generation(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    from steer_client import AsyncSteerClient, SteeringSpec

    model = AsyncSteerClient(address)
    steering = SteeringSpec.simple_add(layer=5, vector=[1.0] * model.hidden_size, scale=1.0)

    messages = [
        {"role": "user", "content": "What is the capital of France?"}
    ]  # fmt: skip

    responses, handles = await model.chat(
        messages,
        max_tokens=100,
        steering_spec=steering,
        capture_layers=[5],
    )

    print(responses[0].generated)  # Just the generated part

    assert len(capsys.readouterr().out.split()) == 100
    assert [handle.layer_indices for handle in handles] == [(5,)]
    await model.close()
