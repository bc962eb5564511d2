"""What all backends have in common in bfloat16; docs/numerics.md says why these bounds. `-s` prints its tables."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.capture import CaptureSite, CaptureSpec, Pooling
from steer_service.core.prompt import TextPrompt, TokenPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.request import GenerateRequest
from steer_service.runtime.results import Generation
from tests.engine.all_backends import GREEDY, AllBackends, all_backends_on, requests_for, run, same_receipt
from tests.engine.oracle import relative_errors
from tests.ops.captured import check_captured
from tests.placed import placed
from tests.tiny_models import ModelFolder

pytestmark = [pytest.mark.engine, pytest.mark.extended]  # an engine of its own takes about 45 s to start

UNIT = 2.0**-8
"""The largest relative error of one rounding to bfloat16."""
ROUNDINGS = 2 * 18
"""In one layer of two backends: norms, q, k, v and their positions, weights, attention, output, gate, up, sums, ..."""
TYPICAL = 1.5
"""How many times the difference of unsteered rows the difference of steered ones may be, in the median row."""


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "bundled"])
def all_backends(request: pytest.FixtureRequest, model_folder: ModelFolder) -> Iterator[AllBackends]:
    with all_backends_on(request.param, model_folder, "bfloat16") as all_backends:
        yield all_backends


def wide_requests(all_backends: AllBackends) -> dict[str, GenerateRequest]:
    """The requests that all backends answer, with rows as float32."""
    requests = requests_for(all_backends)
    return {name: replace(ask, capture=replace(ask.capture, dtype="float32")) for name, ask in requests.items()}


async def test_a_client_gets_the_bits_that_the_engine_gives(all_backends: AllBackends) -> None:
    async with all_backends.backends() as backends:
        for name, request in wide_requests(all_backends).items():
            if request.sampling.n is not None:
                continue  # how rows of several outputs share a step may change a CPU's roundings
            same_bits(await run(backends["served"], request), await run(backends["engine"], request), name)


def same_bits(got: Generation, want: Generation, about: str) -> None:
    assert (got.prompt_token_ids, got.message_boundaries, got.sampling) == (
        want.prompt_token_ids,
        want.message_boundaries,
        want.sampling,
    ), about
    for mine, theirs in zip(got.outputs, want.outputs, strict=True):
        for field in ("text", "token_ids", "logprobs", "finish_reason", "stop", "receipt", "labels"):
            assert getattr(mine, field) == getattr(theirs, field), (about, field)
        for part in ("before", "after"):
            rows, other = getattr(mine.captured, part), getattr(theirs.captured, part)
            assert rows.keys() == other.keys(), about
            assert all(rows[layer].tobytes() == other[layer].tobytes() for layer in rows), (about, part)


async def test_every_backend_steers_its_own_rows_as_the_table_says(all_backends: AllBackends) -> None:
    """But for pooled captures, which are no rows of the stream."""
    requests = [one for one in wide_requests(all_backends).values() if one.capture.pooling is Pooling.NONE]
    special = tuple(all_backends.hf.tokenizer.all_special_ids)
    async with all_backends.backends() as backends:
        for name, backend in backends.items():
            answers = await asyncio.gather(*[run(backend, request) for request in requests])
            errors = [
                check_captured(
                    output, placed(request.steering, places_of(answer, special), output.receipt.rows_total), "bfloat16"
                )
                for request, answer in zip(requests, answers, strict=True)
                for output in answer.outputs
            ]
            print(f"{name}: largest error / tolerance {max(errors):.3f}")


def places_of(answer: Generation, special: Sequence[int] = ()) -> PromptPlaces:
    return PromptPlaces(
        token_ids=answer.prompt_token_ids, messages=answer.message_boundaries, special_token_ids=tuple(special)
    )


async def test_steering_adds_nothing_to_what_rounding_makes_of_a_model(all_backends: AllBackends) -> None:
    """On equal tokens, in one prompt: what is sampled may differ in a near tie."""
    async with all_backends.backends() as backends:
        free = await run(backends["hf"], requests_for(all_backends)["unsteered"])
        layers = all_backends.hf.layer_count
        differences = {}
        for name, request in forced_requests(all_backends, free).items():
            got, want = [await run(backends[backend], request) for backend in ("engine", "hf")]
            same_facts(got, want, name)
            differences[name] = differences_of(got, want)
    bound = np.sqrt(ROUNDINGS * layers) * UNIT
    for name, (typical, largest) in differences.items():
        print(f"| {layers} layers | {name} | {typical:.4f} | {largest:.4f} | {bound:.4f} |")
    for name, (typical, largest) in differences.items():
        assert largest <= bound, name
        assert typical <= TYPICAL * differences["unsteered"][0], name


def forced_requests(all_backends: AllBackends, free: Generation) -> dict[str, GenerateRequest]:
    """The steered requests of one text, and the unsteered one, with what one backend generated as their prompt."""
    places, tokens = places_of(free), [*free.prompt_token_ids, *free.outputs[0].token_ids]
    capture = CaptureSpec(layers=range(all_backends.hf.layer_count), site=CaptureSite.BOTH, dtype="float32")
    return {
        name: replace(
            request,
            prompt=TokenPrompt(token_ids=tokens),
            sampling=replace(GREEDY, max_tokens=1),
            steering=placed(request.steering, places, len(tokens)),
            capture=capture,
        )
        for name, request in requests_for(all_backends).items()
        if isinstance(request.prompt, TextPrompt) and (request.steering is not None or name == "unsteered")
    }


def same_facts(got: Generation, want: Generation, about: str) -> None:
    assert got.prompt_token_ids == want.prompt_token_ids, about
    for mine, theirs in zip(got.outputs, want.outputs, strict=True):
        assert mine.labels == theirs.labels, about
        same_receipt(mine.receipt, theirs.receipt, about)


def differences_of(got: Generation, want: Generation) -> tuple[float, float]:
    """The largest over all layers of the median row's and the largest row's difference, in units of the row's norm."""
    mine, theirs = got.outputs[0].captured, want.outputs[0].captured
    errors_LT = [relative_errors(mine.after[layer], theirs.after[layer]) for layer in mine.after]
    return float(np.median(errors_LT, axis=1).max()), float(np.max(errors_LT))
