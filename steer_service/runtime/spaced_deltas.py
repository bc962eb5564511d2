"""Fewer and larger TokenDeltas, for callers that need no token by itself."""

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from steer_service.core.errors import SteerError
from steer_service.core.events import Completed, Event, PromptLogprobs, Started, TokenDelta


def spaced(events: AsyncGenerator[Event, None], interval: int | None) -> AsyncGenerator[Event, None]:
    """The `events`, with each TokenDelta of an output but its first and its last of at least `interval` tokens.

    None and 1 leave them as they are. 0 stands for one TokenDelta, after the last token. The other events keep their
    place among the tokens of their output: what waits is sent before them, and before an error.
    """
    return events if interval is None or interval == 1 else _spaced(events, interval)


async def _spaced(events: AsyncGenerator[Event, None], interval: int) -> AsyncGenerator[Event, None]:
    waiting: dict[int, list[TokenDelta]] = {}
    counts: Counter[int] = Counter()  # output -> tokens that wait
    begun: set[int] = set()
    async with aclosing(events):
        try:
            async for event in events:
                match event:
                    case TokenDelta(output_index=index):
                        waiting.setdefault(index, []).append(event)
                        counts[index] += len(event.token_ids)
                        if interval and (index not in begun or counts[index] >= interval):
                            begun.add(index)
                            del counts[index]
                            yield _joined(waiting.pop(index))
                    case Started() | PromptLogprobs() | Completed():
                        yield event
                    case _:
                        if event.output_index in waiting:
                            del counts[event.output_index]
                            yield _joined(waiting.pop(event.output_index))
                        yield event
        except SteerError:
            for deltas in waiting.values():
                yield _joined(deltas)
            raise


def _joined(deltas: Sequence[TokenDelta]) -> TokenDelta:
    return replace(
        deltas[0],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
    )
