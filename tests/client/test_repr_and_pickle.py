"""What notebooks show of the client's objects, and which of them travel to other processes."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import steer_client
from steer_client import (
    AblationSpec,
    AddSpec,
    AsyncSteerClient,
    CaptureSpec,
    InvalidRequest,
    LayerSteeringSpec,
    MissingVectors,
    ProjectionCapSpec,
    SteerClient,
    SteerError,
    SteeringSpec,
)
from tests.client.conftest import Server

VECTOR = np.linspace(1.0, 2.0, 4096)
SPECS = (
    AddSpec(VECTOR, scale=2.5),
    ProjectionCapSpec(VECTOR, min=0.0),
    AblationSpec(VECTOR),
    LayerSteeringSpec([AddSpec(VECTOR)] * 9),
    SteeringSpec(layers={layer: LayerSteeringSpec([AddSpec(VECTOR)]) for layer in range(40)}),
    CaptureSpec(layers=tuple(range(80)), positions=[0, range(3, 9), "generated"]),
)
ERRORS = [kind for kind in vars(steer_client).values() if isinstance(kind, type) and issubclass(kind, SteerError)]
COPIES = (pickle.dumps, copy.copy, copy.deepcopy)


@pytest.fixture
def client(server: Server) -> Iterator[SteerClient]:
    with SteerClient(server.address, token="SECRET", client_id="SECRET", metadata=[("key", "SECRET")]) as client:
        yield client


def results(client: SteerClient) -> dict[str, object]:
    """An object of every kind that calls return, made from long prompts."""
    prompts, capture = ["a b c " * 50] * 8, CaptureSpec(layers=(0, 1, 2, 3))
    texts = client.generate(prompts, max_tokens=20, capture=capture)
    generations = client.generate(prompts, max_tokens=20, capture=capture, raw_output=True, logprobs=1)
    assert texts.handles is not None
    texts.handles[0].fetch()
    return {
        "texts": texts,
        "generations": generations,
        "generation": generations.generations[0],
        "output": generations.generations[0].outputs[0],
        "receipt": generations.generations[0].outputs[0].receipt,
        "responses": client.chat([[{"role": "user", "content": "a " * 100}]] * 4, max_tokens=90),
        "info": client.info,
        "tokens": client.render(prompts[0]),
        "rows": texts.handles[0].fetch_rows(),
        "captures": texts.handles[0].captures,
        "handle": texts.handles[0],
        "asynchronous handle": texts.handles[0]._handle,
        "client": client,
        "asynchronous client": client._client,
    }


def test_whatever_a_call_returns_is_shown_on_one_line_without_secrets(client: SteerClient) -> None:
    for name, result in results(client).items():
        shown = repr(result)
        assert len(shown) <= 120, (name, shown)
        assert "\n" not in shown
        assert "SECRET" not in shown
        assert " object at 0x" not in shown


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_a_spec_is_shown_on_one_line(spec: object) -> None:
    assert len(repr(spec)) <= 120
    assert "\n" not in repr(spec)


def test_a_vector_is_shown_by_its_dtype_shape_and_norm() -> None:
    assert repr(AddSpec([3.0, 4.0], scale=2.0)) == "AddSpec(vector=<float32[2], norm 5>, scale=2.0)"
    assert repr(CaptureSpec(layers=(1,))) == "CaptureSpec(layers=(1,))"


def test_a_closed_client_says_so(server: Server) -> None:
    client = SteerClient(server.address)
    assert repr(client) == f"SteerClient('{server.address}')"
    client.close()
    assert repr(client) == f"SteerClient('{server.address}', closed)"


@pytest.mark.parametrize("copied", COPIES, ids=lambda copied: copied.__name__)
def test_clients_and_handles_say_why_they_cannot_travel(
    client: SteerClient, copied: Callable[[object], object]
) -> None:
    [handle] = client.generate("a", max_tokens=1, capture_layers=[1]).handles or []
    for one in (client, client._client, AsyncSteerClient(client.address)):
        with pytest.raises(TypeError, match="cannot be pickled or copied: make a client in each process"):
            copied(one)
    for one in (handle, handle._handle):
        with pytest.raises(TypeError, match="cannot be pickled or copied: fetch the captures, and send their arrays"):
            copied(one)


def test_held_captures_in_a_generation_say_why_it_cannot_travel(client: SteerClient) -> None:
    capture = CaptureSpec(layers=(1,), delivery="held")
    [generation], handles = client.generate("a", max_tokens=1, capture=capture, raw_output=True)
    with pytest.raises(TypeError, match="fetch the captures"):
        pickle.dumps(generation)
    for handle in handles or []:
        handle.close()


def test_results_and_specs_travel(client: SteerClient) -> None:
    capture = CaptureSpec(layers=(1, 2))
    texts = client.generate(["a b"], max_tokens=3)
    [generation], handles = client.generate(["a b"], max_tokens=3, capture=capture, raw_output=True)
    assert handles is not None
    assert pickle.loads(pickle.dumps(texts)) == texts
    travelled = pickle.loads(pickle.dumps(generation))
    assert travelled.outputs[0].token_ids == generation.outputs[0].token_ids
    np.testing.assert_array_equal(travelled.outputs[0].captures[1], generation.outputs[0].captures[1])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(handles[0].fetch()))[1][0]["hidden"], handles[0].matrix(1))
    for spec in SPECS:
        assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_travels_with_all_that_it_says(kind: type[SteerError]) -> None:
    error = kind("is wrong", reason="REASON", field="steering.layers[5]", retry_after_s=2.0)
    error.x_request_id = "r"
    for name, value in {"digests": (b"1",), "count": 3, "instance": "i", "asked_bytes": 2, "allowed_bytes": 1}.items():
        if hasattr(error, name):
            setattr(error, name, value)

    travelled = pickle.loads(pickle.dumps(error))

    assert type(travelled) is kind
    assert (str(travelled), vars(travelled)) == (str(error), vars(error))


def refuse(_: int) -> None:
    raise MissingVectors("is not stored", digests=(b"1",), instance="here", field="steering")


def test_a_pool_brings_an_error_back() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(MissingVectors) as raised:
        pool.map(refuse, [1])
    assert (raised.value.digests, raised.value.instance, raised.value.field) == ((b"1",), "here", "steering")
    assert InvalidRequest in ERRORS
