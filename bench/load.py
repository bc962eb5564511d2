"""The load: many requests at once in one of the modes, timed, with a check that the work of the mode was done."""

import asyncio
import functools
import gc
import itertools
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from steer_service.core.backend import Backend, ModelInfo
from steer_service.core.capture import CaptureSpec
from steer_service.core.events import Event, Receipt, TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.runtime.results import Generation, collect

REQUESTS = 32
"""Requests in flight at once."""
PROMPT_TOKENS = 16
FIRST_TOKEN_ID = 1000
"""The lowest token id of a prompt; ids below it may be special tokens."""

STOCK = "stock"
"""The mode to which the others are compared: vLLM without our code."""
MODES = ("idle", "add_one_layer", "capture_one_layer", "distinct_all_layers", "capture_all_layers")
"""The modes that are compared to STOCK, in the order of a round: the cheapest are nearest to the stock run."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One run: all requests of a mode at once."""

    mode: str
    """STOCK or one of MODES."""
    number: int
    """The seed of the prompts; two batches of a benchmark have the same only if the second is a repeat."""
    max_tokens: int
    """Tokens that every request generates."""
    requests: int = REQUESTS
    """Requests, all in flight at once."""
    prompt_tokens: int = PROMPT_TOKENS
    """Tokens of each prompt."""
    programs: int = REQUESTS
    """For `distinct_all_layers`: the number of programs that the requests share, at most one each."""
    operations: int = 3
    """For `distinct_all_layers`: operations of a program at each layer."""
    stream_interval: int = 1
    """Tokens of one delta, for our engine and server; others send each token."""
    is_repeat: bool = False
    """True if the same prompts and programs ran before: their prefix must be reused."""

    @property
    def rows(self) -> int:
        """Rows of each request: the last sampled token is not fed to the model."""
        return self.prompt_tokens + self.max_tokens - 1


class WorkNotDone(Exception):
    """A run did not do the work of its mode, so its time is meaningless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time of one run."""

    tokens: int
    """Generated tokens of all requests."""
    seconds: float
    """From the first submission to the end of the last response."""
    first_token_s: float = 0.0
    """From the submission of the first request to its first token; 0 where that is not measured."""

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


async def run_batch(backend: Backend, info: ModelInfo, batch: Batch) -> Timing:
    """Runs `batch` on `backend`; raises WorkNotDone if a receipt is not the expected one."""
    requests = requests_for(batch, info)
    first = FirstToken()
    submitted = [backend.submit(request) for request in requests]
    submitted[0] = first.timed(submitted[0])
    seconds, generations = await timed([collect(events) for events in submitted])
    for request, generation in zip(requests, generations, strict=True):
        check_work(batch, request, generation, info)
    return Timing(tokens=batch.requests * batch.max_tokens, seconds=seconds, first_token_s=first.seconds)


class FirstToken:
    """Measures the time to a request's first token."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def timed(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """`events`, unchanged; the time runs from the request for the first event."""
        started = time.perf_counter()
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TokenDelta) and not self.seconds:
                    self.seconds = time.perf_counter() - started
                yield event


async def timed(calls: Sequence[Coroutine[Any, Any, Result]]) -> tuple[float, list[Result]]:
    """Awaits all at once; returns the seconds it took and the results in order."""
    gc.collect()  # garbage of earlier runs is not a cost of this one
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return time.perf_counter() - started, [task.result() for task in tasks]


def requests_for(batch: Batch, info: ModelInfo) -> list[GenerateRequest]:
    """The requests of a batch: new prompts, and the programs and captures of its mode."""
    programs = programs_for(
        batch.mode, batch.requests, batch.programs, batch.operations, info.layer_count, info.hidden_size
    )
    capture = capture_for(batch.mode, info.layer_count)
    sampling = SamplingOptions(max_tokens=batch.max_tokens, temperature=0.0, ignore_eos=True)
    return [
        GenerateRequest(
            prompt=TokenPrompt(token_ids=prompt),
            sampling=sampling,
            steering=program,
            capture=capture,
            stream_interval=batch.stream_interval,
        )
        for prompt, program in zip(prompts_for(batch, info.vocab_size), programs, strict=True)
    ]


def prompts_for(batch: Batch, vocab_size: int) -> list[tuple[int, ...]]:
    """A prompt for each request; two requests of a benchmark have the same only if the batch is a repeat."""
    shape = (batch.requests, batch.prompt_tokens)
    ids = np.random.default_rng(batch.number).integers(FIRST_TOKEN_ID, vocab_size, shape)
    return [tuple(prompt) for prompt in ids.tolist()]


@functools.cache
def programs_for(
    mode: str, requests: int, programs: int, operations: int, layer_count: int, hidden_size: int
) -> list[SteeringSpec | None]:
    """The steering of each request; None for no steering."""
    match mode:
        case "add_one_layer":
            return _one_add_each(requests, layer_count // 2, hidden_size)
        case "distinct_all_layers":
            distinct = [_operations_everywhere(seed, operations, layer_count, hidden_size) for seed in range(programs)]
            return [distinct[index % programs] for index in range(requests)]
    return [None] * requests


def _one_add_each(requests: int, layer: int, hidden_size: int) -> list[SteeringSpec | None]:
    direction = np.random.default_rng(0).standard_normal(hidden_size)
    unit = direction / np.linalg.norm(direction)
    return [SteeringSpec.simple_add(layer, unit, scale=1.0 + index / requests) for index in range(requests)]


def _operations_everywhere(seed: int, count: int, layer_count: int, hidden_size: int) -> SteeringSpec:
    """`count` operations after every layer: addition, cap, ablation, addition and so on, all directions different."""
    directions = np.random.default_rng(seed).standard_normal((layer_count, count, hidden_size))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    makers = itertools.cycle(
        [
            lambda direction: AddSpec(vector=direction, scale=0.5),
            lambda direction: ProjectionCapSpec(vector=direction, min=-1.0, max=1.0),
            lambda direction: AblationSpec(vector=direction, scale=0.5),
        ]
    )
    return SteeringSpec(
        layers={
            layer: LayerSteeringSpec(operations=tuple(next(makers)(direction) for direction in of_layer))
            for layer, of_layer in enumerate(directions)
        }
    )


def capture_for(mode: str, layer_count: int) -> CaptureSpec | None:
    """The capture of every request; None for no capture."""
    match mode:
        case "capture_one_layer":
            return CaptureSpec(layers=(layer_count // 2,))
        case "capture_all_layers":
            return CaptureSpec(layers=tuple(range(layer_count)))
    return None


def check_work(batch: Batch, request: GenerateRequest, generation: Generation, info: ModelInfo) -> None:
    """Raises WorkNotDone unless the response has every token, and every row was steered and captured.

    Rows are reused from the prefix cache exactly if the batch is a repeat.
    """
    output = generation.outputs[0]
    if len(output.token_ids) != batch.max_tokens:
        raise WorkNotDone(f"got {len(output.token_ids)} tokens, expected {batch.max_tokens}")
    expected = expected_receipt(request, batch.rows)
    if batch.is_repeat:
        reused = output.receipt.rows_from_prefix_cache
        if not reused:
            raise WorkNotDone("no row of the prefix was reused")
        expected = replace(expected, rows_from_prefix_cache=reused, rows_steered=expected.rows_steered - reused)
    work = replace(output.receipt, bytes_reserved=0, bytes_captured=0)  # memory is not compared
    if work != expected:
        raise WorkNotDone(f"the receipt is {output.receipt}, expected {expected}")
    shapes = {layer: rows.shape for layer, rows in output.captures.items()}
    if shapes != dict.fromkeys(expected.captured_layers, (expected.rows_total, info.hidden_size)):
        raise WorkNotDone(f"got captures of shapes {shapes}, expected {expected.captured_layers}")


def expected_receipt(request: GenerateRequest, rows: int) -> Receipt:
    """The receipt of a request that was steered and captured at every row."""
    steering, capture = request.steering, request.capture
    return Receipt(
        steering_digest=steering.digest() if steering is not None else "",
        steered_layers=tuple(steering.layers) if steering is not None else (),
        rows_steered=rows if steering is not None else 0,
        captured_layers=capture.layers if capture is not None else (),
        rows_captured=rows if capture is not None else 0,
        rows_from_prefix_cache=0,
        rows_total=rows,
    )
