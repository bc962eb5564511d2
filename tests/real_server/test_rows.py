"""Steered and captured rows of a real model through gRPC."""

import asyncio

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from steer_client import AsyncSteerClient
from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.runtime.results import collect
from steer_service.wire import generation_pb2_grpc
from steer_service.wire.events import events_from_responses
from steer_service.wire.request import request_to_proto
from tests.ops.captured import check_captured
from tests.placed import placed
from tests.real_server.serving import Server, ask, run

ALICE = (("steer-client-id", "alice"),)
"""Stored vectors belong to a client."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]


async def test_a_mixed_batch_through_grpc_is_steered_captured_and_receipted(client: AsyncSteerClient) -> None:
    """Each capture equals HuggingFace's stream, as far as bfloat16 carries; the steered one differs by the vector."""
    vector = np.random.default_rng(0).normal(size=576)
    spec = SteeringSpec.simple_add(12, vector, 1.0)
    capture = CaptureSpec(layers=(3, 12))
    plain, steered, uncaptured = await asyncio.gather(
        run(client, ask("The sea is", capture=capture)),
        run(client, ask("The sea is", capture=capture, steering=spec)),
        run(client, ask("The sea is", steering=spec)),
    )
    output = plain.outputs[0]
    model = AutoModelForCausalLM.from_pretrained(ensure_bundled_model(), dtype=torch.float32)
    sequence = torch.tensor([[*plain.prompt_token_ids, *output.token_ids[:-1]]])
    with torch.no_grad():
        states = model(sequence, output_hidden_states=True).hidden_states
    for layer in capture.layers:
        got, want = output.captures[layer].astype(np.float64), states[layer + 1][0].double().numpy()
        cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
        assert got.shape == want.shape
        assert cosine.min() > 0.995
    prompt = len(plain.prompt_token_ids)
    change = (steered.outputs[0].captures[12][:prompt].astype(np.float64) - output.captures[12][:prompt]).mean(0)
    assert np.dot(change, vector) / np.linalg.norm(change) / np.linalg.norm(vector) > 0.99
    assert steered.outputs[0].captures[3][:prompt].tobytes() == output.captures[3][:prompt].tobytes()
    assert uncaptured.outputs[0].receipt.rows_steered == prompt + 8 - 1
    assert uncaptured.outputs[0].receipt.steering_digest == spec.digest()


async def test_as_many_tokens_of_a_prompt_are_kept_as_fit(client: AsyncSteerClient) -> None:
    info, ids = await client.load_info(), [5 + index % 1000 for index in range(600)]
    assert (info.max_model_len, info.max_prompt_tokens) == (512, 512)
    for max_tokens, most in ((0, 512), (1, 511)):
        prompt, sampling = TokenPrompt(token_ids=ids), SamplingOptions(max_tokens=max_tokens)
        request = GenerateRequest(prompt=prompt, sampling=sampling, truncate_prompt_tokens=-1)
        assert (await run(client, request)).prompt_token_ids == tuple(ids[-most:])


async def test_a_program_that_is_named_steers_as_the_one_that_was_sent(server: Server) -> None:
    """Three operations with vectors of their own at every layer: the rows are the same, bit by bit."""
    vectors = np.random.default_rng(3).normal(size=(30, 3, 576))
    spec = SteeringSpec(
        {
            layer: LayerSteeringSpec([AddSpec(one, 0.1), ProjectionCapSpec(two, max=1.0), AblationSpec(three, 0.5)])
            for layer, (one, two, three) in enumerate(vectors)
        }
    )
    request = ask("The river is", capture=CaptureSpec(layers=(0, 29)), steering=spec)
    carried, named = request_to_proto(request), request_to_proto(request, spec.vector_digests())
    assert named.ByteSize() < carried.ByteSize() / 40
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        sent, found = [  # one after the other: the first stores what the second names
            (await collect(events_from_responses(stub.Generate(message, timeout=60, metadata=ALICE)))).outputs[0]
            for message in (carried, named)
        ]
    assert sent.receipt.steering_digest == found.receipt.steering_digest == spec.digest()
    assert (sent.text, sent.receipt.rows_captured) == (found.text, found.receipt.rows_captured)
    assert [sent.captures[layer].tobytes() == found.captures[layer].tobytes() for layer in (0, 29)] == [True, True]


async def test_a_float32_capture_of_a_bfloat16_model_keeps_what_rounding_loses(client: AsyncSteerClient) -> None:
    """Rounded it is the capture in the model's type; a stream that steering wrote back was rounded by that."""
    spec = SteeringSpec.simple_add(12, np.random.default_rng(0).normal(size=576), 1.0)
    captures = [CaptureSpec(layers=(3, 12), site=CaptureSite.BOTH, dtype=dtype) for dtype in (None, "float32")]
    answers = [await run(client, ask("The mountain is", capture=capture, steering=spec)) for capture in captures]
    narrow, wide = [answer.outputs[0].captured for answer in answers]
    for rounded, kept in ((narrow.before, wide.before), (narrow.after, wide.after)):
        for layer in (3, 12):
            assert (rounded[layer].dtype, kept[layer].dtype) == (ml_dtypes.bfloat16, np.float32)
            assert kept[layer].astype(ml_dtypes.bfloat16).tobytes() == rounded[layer].tobytes()
            is_written_back = layer == 12 and kept is wide.after
            assert (kept[layer] == rounded[layer].astype(np.float32)).all() == is_written_back


async def test_rows_are_steered_as_closely_as_published(client: AsyncSteerClient) -> None:
    """Each operation, and all in two orders, on the rows that the server itself says were there before."""
    vectors = np.random.default_rng(2).normal(size=(3, 576))
    operations = (AddSpec(vectors[0]), ProjectionCapSpec(vectors[1], min=-0.1, max=0.3), AblationSpec(vectors[2], -0.5))
    capture = CaptureSpec(layers=(3, 12, 29), site=CaptureSite.BOTH, dtype="float32")
    for order in (*((one,) for one in operations), operations, operations[::-1]):
        spec = SteeringSpec({layer: LayerSteeringSpec(order) for layer in (3, 12)}, positions=[-1, "generated"])
        answer = await run(client, ask("The river is", capture=capture, steering=spec))
        rows = answer.outputs[0].receipt.rows_total
        numbered = placed(spec, PromptPlaces(token_ids=answer.prompt_token_ids), rows)
        assert check_captured(answer.outputs[0], numbered, "bfloat16") <= 1.0
