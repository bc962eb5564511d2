"""The calls of a Python client under test, asynchronous or not; each checks its result."""

import asyncio
import gc
import random
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from itertools import islice
from typing import Any

from bench.soak.client_results import (
    Wrong,
    check_generation,
    check_rows,
    check_text,
    is_explained,
)
from steer_client import AsyncSteerClient, CaptureSpec, ChatMessage, SteerClient
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.stream_events import OutputCaptured

LAYERS = (0, 2)
DELIVERIES = ("inline", "held", "shared_memory_preferred", "shared_memory_required")
STEERING = SteeringSpec.simple_add(1, [0.5] * 64, 2.0)

PATIENT_S = 60.0
"""Seconds for which a call with `retry_timeout_s` tries again."""


class Either:
    """A client of either kind, whose calls can be awaited: those of a SteerClient run in threads."""

    def __init__(self, client: AsyncSteerClient | SteerClient) -> None:
        self.client = client
        self._is_sync = isinstance(client, SteerClient)

    async def call(self, method: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """The result of a method of the client, or of one of its handles."""
        if self._is_sync:
            return await asyncio.to_thread(method, *args, **keywords)
        return await method(*args, **keywords)

    async def read(self, method: Callable[..., Any], most: int, *args: Any, **keywords: Any) -> list[Any]:
        """The first `most` items of an iterator, which is closed then."""
        if self._is_sync:
            return await asyncio.to_thread(_read, method, most, args, keywords)
        items: list[Any] = []
        async with aclosing(method(*args, **keywords)) as source:
            async for item in source:
                items.append(item)
                if len(items) == most:
                    break
        return items


def _read(method: Callable[..., Any], most: int, args: Any, keywords: Any) -> list[Any]:
    iterator = method(*args, **keywords)
    try:
        return list(islice(iterator, most))
    finally:
        iterator.close()


def some_prompt(chance: random.Random) -> TextPrompt:
    """A prompt of 2 to 60 words."""
    return TextPrompt(text=" ".join(str(chance.randrange(10**6)) for _ in range(chance.randint(2, 60))))


async def many(one: Either, chance: random.Random, *, is_patient: bool = False) -> None:
    """Many prompts, a few at a time; each result is right or an error that is explained."""
    prompts, count = [some_prompt(chance) for _ in range(chance.randint(4, 24))], chance.randint(1, 8)
    result = await one.call(
        one.client.generate,
        prompts,
        max_tokens=count,
        steering_spec=STEERING if chance.random() < 0.5 else None,
        capture=CaptureSpec(layers=LAYERS) if is_patient else some_capture(chance),
        raw_output=True,
        return_exceptions=True,
        max_concurrency=4,
        retry_timeout_s=PATIENT_S if is_patient else None,
    )
    failed = [entry for entry in result.generations if isinstance(entry, Exception)]
    bad = [entry for entry in failed if is_patient or not is_explained(entry)]
    if bad:
        raise bad[0]
    for prompt, entry, handle in zip(prompts, result.generations, result.handles, strict=True):
        if not isinstance(entry, Exception):
            check_generation(entry, prompt, count)
            await use(one, handle, prompt, count, chance)
    if failed:
        raise failed[0]


async def patient(one: Either, chance: random.Random) -> None:
    """Many prompts that are sent again after each outage: all succeed."""
    await many(one, chance, is_patient=True)


def some_capture(chance: random.Random) -> CaptureSpec:
    return CaptureSpec(layers=LAYERS, delivery=chance.choice(DELIVERIES))


async def use(one: Either, handle: Any, prompt: Prompt, count: int, chance: random.Random) -> None:
    """Reads a capture and closes it; some are dropped, read or not."""
    ending = chance.random()
    if ending < 0.85:
        check_rows(await one.call(handle.fetch), LAYERS, prompt, count)
    if ending < 0.7:
        await one.call(handle.close)


async def captured(one: Either, chance: random.Random) -> None:
    """One capture of each delivery."""
    for delivery in DELIVERIES:
        prompt, count = some_prompt(chance), chance.randint(1, 8)
        _, handles = await one.call(
            one.client.generate, prompt, max_tokens=count, capture=CaptureSpec(layers=LAYERS, delivery=delivery)
        )
        await use(one, handles[0], prompt, count, chance)


async def chat(one: Either, chance: random.Random) -> None:
    """A conversation."""
    messages, count = [{"role": "user", "content": some_prompt(chance).text}], chance.randint(1, 8)
    prompt = ChatPrompt(messages=tuple(ChatMessage(**message) for message in messages))
    result = await one.call(one.client.chat, messages, max_tokens=count, capture=some_capture(chance), raw_output=True)
    check_generation(result.generations[0], prompt, count)
    await use(one, result.handles[0], prompt, count, chance)


async def stream(one: Either, chance: random.Random) -> None:
    """The text of a response, to its end or not."""
    prompt, count, most = some_prompt(chance), chance.randint(2, 30), chance.choice((1, 5, 10**6))
    pieces = await one.read(one.client.stream, most, prompt, max_tokens=count)
    check_text("".join(pieces), prompt, count, is_whole=most > count)


async def events(one: Either, chance: random.Random) -> None:
    """The events of a response with a capture, to their end or not."""
    prompt, count, most = some_prompt(chance), chance.randint(1, 8), chance.choice((2, 10**6))
    seen = await one.read(one.client.stream_events, most, prompt, max_tokens=count, capture=some_capture(chance))
    handles = [event.handle for event in seen if isinstance(event, OutputCaptured)]
    if most > 2 and len(handles) != 1:
        raise Wrong(f"{len(handles)} captures among the events")
    for handle in handles:
        await use(one, handle, prompt, count, chance)


async def score(one: Either, chance: random.Random) -> None:
    """Answers to two prompts."""
    prompts = [some_prompt(chance).text for _ in range(2)]
    scores = await one.call(one.client.score, prompts, [" a b", " c"])
    if [list(entry.logprobs) for entry in scores] != [[-1.0] * 2, [-1.0]]:
        raise Wrong(f"scores: {scores}")


async def cancelled(one: Either, chance: random.Random) -> None:
    """A call whose caller gives up."""
    task = asyncio.ensure_future(captured(one, chance))
    await asyncio.sleep(chance.random() * 0.05)
    task.cancel()
    results = await asyncio.gather(task, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


Call = Callable[[Either, random.Random], Coroutine[Any, Any, None]]

CALLS: tuple[Call, ...] = (many, captured, chat, stream, events, score, cancelled, patient)


async def dropped(address: str, chance: random.Random, make: Callable[..., Any]) -> None:
    """A client that is used and never closed."""
    one = Either(make(address))
    try:
        await chance.choice((captured, stream, events))(one, chance)
    finally:
        del one
        gc.collect()


async def closed(address: str, chance: random.Random, make: Callable[..., Any]) -> None:
    """A client that is used and closed."""
    one = Either(make(address))
    try:
        await chance.choice((captured, many, score))(one, chance)
    finally:
        await one.call(one.client.close)
