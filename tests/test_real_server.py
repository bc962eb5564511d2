"""The whole of it: real clients, real gRPC, `steer serve` on the bundled model on real vLLM."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import AutoModelForCausalLM

from steer_client import AsyncSteerClient, SteerClient
from steer_service.core.capture import CapturedRows, CaptureSite, CaptureSpec
from steer_service.core.errors import EngineFailed, InvalidRequest, NotFound, SteerError, Unsupported
from steer_service.core.events import TokenDelta
from steer_service.core.prompt import TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.results import Generation, collect
from steer_service.wire import generation_pb2_grpc
from steer_service.wire.events import events_from_responses
from steer_service.wire.request import request_to_proto
from steer_service.wire.status_codes import error_from_rpc
from tests.ops.captured import check_captured
from tests.shm.folders import open_files_limit

pytestmark = [pytest.mark.engine, pytest.mark.slow]

START_S = 300.0
FLAGS = [
    *("--port", "0", "--max-model-len", "512", "--kv-cache-memory-bytes", str(256 << 20)),
    *("--grace", "60", "--disable-log-stats"),
]


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    health_while_loading: int
    error_while_loading: SteerError

    def next_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def start_server() -> Server:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_files_limit(min(1024, hard)):  # what most systems let a process begin with
        process = subprocess.Popen(
            [sys.executable, "-m", "steer_service.cli", "serve", *FLAGS], stdout=subprocess.PIPE, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.strip().removeprefix("steer: listening on ")
        assert address != line.strip(), line
        health, error = health_of(address), error_of_a_generation(address)
        for line in process.stdout:
            if line.startswith("steer: serving "):
                return Server(process, address, health, error)
        raise AssertionError(f"the server ended with {process.wait()}")
    except BaseException:
        process.kill()
        process.wait()
        raise


def health_of(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True).status


def error_of_a_generation(address: str) -> SteerError:
    with grpc.insecure_channel(address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request_to_proto(ask("Hello")), timeout=30)
        try:
            next(iter(call))
        except grpc.RpcError as error:
            return error_from_rpc(error)
    raise AssertionError("a server that is loading answered")


def ask(text: str, **changes: object) -> GenerateRequest:
    sampling = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **changes.pop("sampling", {})}
    return GenerateRequest(prompt=TextPrompt(text=text), sampling=SamplingOptions(**sampling), **changes)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = start_server()
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=90) == 0


@pytest.fixture
async def client(server: Server):
    async with AsyncSteerClient(server.address, timeout_s=300) as client:
        yield client


async def run(client: AsyncSteerClient, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(client.submit(request)), timeout=300)


def test_health_says_serving_only_once_it_is(server: Server) -> None:
    assert server.health_while_loading == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.error_while_loading.reason == "LOADING"
    assert health_of(server.address) == health_pb2.HealthCheckResponse.SERVING


def test_it_and_its_workers_may_open_as_many_files_as_the_system_allows(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    limits = [one.rlimit(psutil.RLIMIT_NOFILE) for one in (process, *process.children(recursive=True))]

    assert len(limits) > 1
    assert set(limits) == {(hard, hard)}


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
        assert layer_5.shape == (5 + 10 - 1, 576)
        assert layer_5.dtype == ml_dtypes.bfloat16

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
            (await collect(events_from_responses(stub.Generate(message, timeout=60)))).outputs[0]
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
        assert check_captured(answer.outputs[0], spec, "bfloat16") <= 1.0


class TestDeliveries:
    """The same rows, whichever way they come."""

    CAPTURE = CaptureSpec(layers=(29, 3), site=CaptureSite.BOTH)
    SPEC = SteeringSpec.simple_add(29, np.random.default_rng(1).normal(size=576), 1.0)

    async def rows_of(self, client: AsyncSteerClient, **changes: object) -> tuple[CapturedRows, CaptureHandle]:
        capture = replace(self.CAPTURE, **changes)
        options = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, "steering_spec": self.SPEC}
        _, handles = await client.generate(["The harbour lies"], capture=capture, **options)
        return await handles[0].fetch_rows(), handles[0]

    async def test_every_delivery_brings_the_same_rows(self, client: AsyncSteerClient) -> None:
        inline, _ = await self.rows_of(client)
        for changes in ({"is_live": True}, {"delivery": "held"}, {"delivery": "shared_memory_required"}):
            rows, handle = await self.rows_of(client, **changes)
            assert rows == inline, changes
            assert rows.labels is not None
            await handle.close()
        assert segments_here() == []

    async def test_a_held_capture_is_fetched_in_parts_and_is_gone_when_closed(self, client: AsyncSteerClient) -> None:
        whole, handle = await self.rows_of(client, delivery="held")
        async with handle:
            part = await handle.fetch_rows(layers=[29], positions=["generated", -1])
            assert part == whole.select([29], part.spans)
            assert len(part.labels) == 6
        with pytest.raises(NotFound):
            await handle.fetch_rows()

    async def test_shared_rows_are_mapped_and_stay_when_the_lease_is_gone(self, client: AsyncSteerClient) -> None:
        _, handle = await self.rows_of(client, delivery="shared_memory_preferred")
        captures = await handle.fetch(framework="torch")
        assert len(segments_here()) == 1
        before = captures[3][0]["hidden"].clone()
        await handle.close()
        assert segments_here() == []
        assert captures[3][0]["hidden"].dtype == torch.bfloat16
        assert torch.equal(captures[3][0]["hidden"], before)

    async def test_a_client_that_leaves_takes_its_leases_with_it(self, server: Server) -> None:
        async with AsyncSteerClient(server.address) as leaving:
            rows, handle = await self.rows_of(leaving, delivery="shared_memory_required")
            assert len(segments_here()) == 1
        for _ in range(100):
            if not segments_here():
                break
            await asyncio.sleep(0.05)
        assert segments_here() == []
        assert np.isfinite(rows.after[3].astype(np.float32)).all()
        await handle.close()

    def test_the_sync_client_fetches_several(self, server: Server) -> None:
        seen: list[tuple[int, int]] = []
        with SteerClient(server.address) as client:
            _, handles = client.generate(["One", "Two"], max_tokens=3, capture=replace(self.CAPTURE, delivery="held"))
            captures = client.fetch_all(handles, progress=lambda here, all_: seen.append((here, all_)))
            total = sum(handle.total_bytes for handle in handles)
            for handle in handles:
                handle.close()
        assert [captured[3][0]["after"].shape[1] for captured in captures] == [576, 576]
        assert seen[-1] == (total, total)


def segments_here() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("steerllm-")]


BAD_REQUESTS = {
    "an unknown layer": (
        lambda: ask("x", steering=SteeringSpec.simple_add(30, np.ones(576))),
        InvalidRequest,
        "steering.layers[30]",
        "UNKNOWN_LAYER",
    ),
    "a wrong width": (
        lambda: ask("x", steering=SteeringSpec.simple_add(3, np.ones(64))),
        InvalidRequest,
        "steering.layers[3].operations[0].vector",
        "WRONG_WIDTH",
    ),
    "an overflow in bfloat16": (
        lambda: ask("x", steering=SteeringSpec(layers={3: LayerSteeringSpec([AddSpec(np.full(576, 3.4e38))])})),
        InvalidRequest,
        "steering.layers[3].operations[0].vector",
        "NON_FINITE",
    ),
    "an unknown capture layer": (
        lambda: ask("x", capture=CaptureSpec(layers=(1, 99))),
        InvalidRequest,
        "capture.layers[1]",
        "UNKNOWN_LAYER",
    ),
    "a prompt over the model's limit": (
        lambda: GenerateRequest(prompt=TokenPrompt(token_ids=[5] * 512)),
        InvalidRequest,
        "prompt",
        "PROMPT_TOO_LONG",
    ),
    "an unknown model": (lambda: ask("x", model="another"), NotFound, "model", "UNKNOWN_MODEL"),
}


class TestBadInput:
    @pytest.mark.parametrize("name", BAD_REQUESTS)
    async def test_it_is_refused_by_field_and_nobody_else_notices(self, client: AsyncSteerClient, name: str) -> None:
        make, kind, field, reason = BAD_REQUESTS[name]
        other = asyncio.ensure_future(run(client, ask("Meanwhile", sampling={"max_tokens": 16})))
        with pytest.raises(kind) as caught:
            await anext(client.submit(make()))
        assert (caught.value.field, caught.value.reason) == (field, reason)
        assert len((await other).outputs[0].token_ids) == 16

    @pytest.mark.parametrize(
        ("break_it", "field"),
        [
            (lambda m: m.ClearField("prompt"), "prompt"),
            (lambda m: setattr(m, "text", ""), "prompt"),
            (lambda m: setattr(m.sampling, "max_tokens", 0), "sampling.max_tokens"),
            (lambda m: setattr(m.sampling, "temperature", float("nan")), "sampling.temperature"),
            (lambda m: setattr(_vector(m), "data", b"abc"), "steering.layers[3].operations[0].vector"),
            (lambda m: setattr(_vector(m), "data", _floats(np.nan)), "steering.layers[3].operations[0].vector"),
            (lambda m: setattr(_vector(m), "data", _floats(0.0)), "steering.layers[3].operations[0].vector"),
            (lambda m: setattr(_operation(m).add, "scale", float("inf")), "steering.layers[3].operations[0].scale"),
            (lambda m: _invert_bounds(m), "steering.layers[3].operations[0].min"),
        ],
        ids=["no prompt", "empty", "no tokens", "NaN", "truncated", "NaN vector", "zero norm", "inf scale", "inverted"],
    )
    async def test_what_no_client_of_ours_would_send_is_refused_by_field(self, server, client, break_it, field) -> None:
        message = request_to_proto(ask("x", steering=SteeringSpec.simple_add(3, np.ones(576))))
        break_it(message)
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(message, timeout=60)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidRequest)
        assert error.field.startswith(field)
        assert (await run(client, ask("Still here"))).outputs[0].text

    async def test_a_message_over_the_limit_is_refused(self, client: AsyncSteerClient) -> None:
        with pytest.raises(SteerError) as caught:
            await anext(client.submit(ask("x" * (17 << 20))))
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert (await run(client, ask("Still here"))).outputs[0].text

    async def test_what_is_not_built_says_so(self, server: Server) -> None:
        message = request_to_proto(ask("x", capture=CaptureSpec(layers=(1,))))
        message.time_budget.FromSeconds(5)
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(message, timeout=60)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert isinstance(error_from_rpc(caught.value), Unsupported)


def _operation(message):
    return message.steering.layers[0].operations[0]


def _vector(message):
    return _operation(message).add.vector.inline


def _floats(value: float) -> bytes:
    return np.full(576, value, np.float32).tobytes()


def _invert_bounds(message) -> None:
    vector = _operation(message).add.vector
    cap = type(_operation(message))()
    cap.projection_cap.vector.CopyFrom(vector)
    cap.projection_cap.min, cap.projection_cap.max = 1.0, -1.0
    _operation(message).CopyFrom(cap)


async def test_closing_the_iterator_frees_the_engine(server: Server, client: AsyncSteerClient) -> None:
    spec = SteeringSpec.simple_add(3, np.ones(576))
    for _ in range(5):
        request = ask("Tell me", steering=spec, capture=CaptureSpec(layers=(3,)), sampling={"max_tokens": 400})
        async with aclosing(client.submit(request)) as events:
            async for event in events:
                if isinstance(event, TokenDelta):
                    break
    await run(client, ask("Still here"))
    assert segments_here() == []


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


def test_sigterm_lets_a_running_request_finish_and_leaves_nothing_behind() -> None:
    before = set(os.listdir("/dev/shm"))
    server = start_server()
    children = psutil.Process(server.process.pid).children(recursive=True)

    async def drain() -> tuple[Generation, SteerError]:
        async with AsyncSteerClient(server.address) as client:
            events = client.submit(ask("A long story", sampling={"max_tokens": 300}))
            first = await anext(events)
            server.process.send_signal(signal.SIGTERM)
            while await asyncio.to_thread(health_of, server.address) == health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.01)
            with pytest.raises(EngineFailed) as refused:
                await run(client, ask("Too late"))
            return await collect(_chain(first, events)), refused.value

    generation, refused = asyncio.run(drain())
    assert len(generation.outputs[0].token_ids) == 300
    assert refused.reason == "DRAINING"
    assert server.process.wait(timeout=90) == 0
    assert server.process.stdout is not None
    assert "EngineDeadError" not in server.process.stdout.read()  # vLLM logs to standard output
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert set(os.listdir("/dev/shm")) - before == set()


async def _chain(first, rest):
    yield first
    async for event in rest:
        yield event


def test_an_engine_that_dies_while_nobody_asks_ends_the_server() -> None:
    """An orchestrator must see it: health first, then the exit status."""
    server = start_server()
    children = psutil.Process(server.process.pid).children(recursive=True)
    next(child for child in children if "EngineCore" in child.name()).kill()
    assert server.process.wait(timeout=90) == 1
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_sigterm_while_loading_exits_cleanly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "steer_service.cli", "serve", *FLAGS], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "listening on" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
