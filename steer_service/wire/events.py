"""Events <-> the responses of Generate."""

import itertools
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Sequence
from dataclasses import replace

from steer_service.core.capture import Pooling
from steer_service.core.errors import InvalidRequest
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Completed,
    Event,
    FinishReason,
    OutputFinished,
    PromptLogprobs,
    Started,
    TokenDelta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from steer_service.core.positions import PositionScope
from steer_service.core.row_selection import rows_at_most, rows_fed
from steer_service.core.spans import count_rows
from steer_service.wire import capture_pb2, generation_pb2
from steer_service.wire.blocks import (
    DEFAULT_CHUNK_BYTES,
    BlockReader,
    Lease,
    SharedBlock,
    chunks_of,
    region_to_proto,
)
from steer_service.wire.capture import (
    boundaries_from_proto,
    boundaries_to_proto,
    delivery_from_proto,
    delivery_to_proto,
    fallback_from_proto,
    fallback_to_proto,
    labels_from_proto,
    labels_to_proto,
)
from steer_service.wire.chunks import ChunkResponse, chunk_from_proto
from steer_service.wire.fields import bad_stream, unreadable, wrong_sequence
from steer_service.wire.receipts import receipt_from_proto, receipt_to_proto
from steer_service.wire.request import sampling_from_proto, sampling_to_proto
from steer_service.wire.stored_capture import StoredCaptureNotice, held_from_proto, held_to_proto

WireEvent = Event | StoredCaptureNotice | SharedBlock
"""An event as it is read: a CaptureHeld arrives as a notice, or as one SharedBlock for each of its blocks."""

Response = generation_pb2.GenerateResponse | ChunkResponse
"""A response of Generate; chunks have a type of their own, which saves copies."""

_REASON_TO_PROTO = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.TIME_BUDGET: generation_pb2.FINISH_REASON_TIME_BUDGET,
}
_REASON_FROM_PROTO: dict[int, FinishReason] = {number: reason for reason, number in _REASON_TO_PROTO.items()}


LOGPROBS_PER_MESSAGE = 8192
"""Log-probabilities in one message at most, unless one token has more; keeps messages below 4 MiB."""


TOKENS_PER_MESSAGE, MOST_TEXT = 1 << 16, 1 << 18
"""Token ids and characters in one message at most, for the same reason."""


class EventWriter:
    """Turns the events of one request into its responses."""

    def __init__(
        self,
        max_chunk_bytes: int | None = None,
        *,
        numbers: Iterator[int] | None = None,
        cancel_token: bytes = b"",
        capture_row_bytes: int = 0,
        capture_positions: PositionScope | None = None,
        pooling: Pooling = Pooling.NONE,
        special_token_ids: tuple[int, ...] = (),
    ) -> None:
        """`special_token_ids`: those of the model, which `capture_positions` may leave out.

        `numbers`: of the responses, shared with whoever else writes to the stream; by default 0, 1, 2, ...
        """
        self._max_chunk_bytes = max_chunk_bytes or DEFAULT_CHUNK_BYTES
        self._cancel_token = cancel_token
        self._capture_row_bytes = capture_row_bytes  # bytes at one position, all layers and sites together
        self._capture_positions = capture_positions
        self._pooling = pooling
        self._special_token_ids = special_token_ids
        self._numbers = numbers or itertools.count()
        self._capture = 0

    def responses(self, event: Event) -> Iterable[Response]:
        """The responses of `event`, to be iterated once; the rows of a CaptureBlock are read only then.

        Raises TypeError for a CaptureHeld, which `held` or `shared` writes.
        """
        if isinstance(event, TokenDelta):  # by far the most frequent
            if event.logprobs or len(event.token_ids) > TOKENS_PER_MESSAGE or len(event.text) > MOST_TEXT:
                return map(self._token, _deltas(event))
            return (self._token(event),)
        return self._others(event)

    def _others(self, event: Event) -> Iterator[Response]:
        match event:
            case Started():
                started = _started_to_proto(event, self._cancel_token, self._capture_bytes_limit(event))
                yield self._numbered(generation_pb2.GenerateResponse(started=started))
            case PromptLogprobs():
                for part in _parts(event):
                    yield self._numbered(
                        generation_pb2.GenerateResponse(prompt_logprobs=_prompt_logprobs_to_proto(part))
                    )
            case CaptureLabels():
                for labels in labels_to_proto(event):
                    yield self._numbered(generation_pb2.GenerateResponse(capture_labels=labels))
            case CaptureBlock():
                for chunk in chunks_of(event, self._next_capture(), self._max_chunk_bytes):
                    yield ChunkResponse(next(self._numbers), chunk)
            case CaptureHeld():
                raise TypeError("a CaptureHeld is written by `held` or `shared`")
            case OutputFinished():
                yield self._numbered(generation_pb2.GenerateResponse(finished=_finished_to_proto(event)))
            case Completed():
                yield self._numbered(generation_pb2.GenerateResponse(completed=_completed_to_proto(event)))

    def _token(self, event: TokenDelta) -> generation_pb2.GenerateResponse:
        """The response of one delta, written in place: a message that is copied into another takes twice as long."""
        response = generation_pb2.GenerateResponse(sequence=next(self._numbers))
        token = response.token
        token.output_index = event.output_index
        token.text = event.text
        token.token_ids.extend(event.token_ids)
        if event.logprobs:
            token.logprobs.extend(map(_logprob_to_proto, event.logprobs))
        return response

    def held(self, notice: StoredCaptureNotice) -> generation_pb2.GenerateResponse:
        """The response that announces captures held on the server."""
        return self._numbered(generation_pb2.GenerateResponse(capture_held=held_to_proto(notice)))

    def shared(self, blocks: Sequence[CaptureBlock], offsets: Sequence[int], lease: Lease) -> Iterator[Response]:
        """The responses that hand out blocks in shared memory, at byte `offsets` of the lease's segment."""
        for block, offset in zip(blocks, offsets, strict=True):
            region = region_to_proto(block, self._next_capture(), offset, lease)
            yield self._numbered(generation_pb2.GenerateResponse(capture_shm=region))

    def _capture_bytes_limit(self, event: Started) -> int:
        prompt_tokens = len(event.prompt_token_ids)
        rows = rows_at_most(prompt_tokens, event.sampling.max_tokens or 0)
        scope = self._capture_positions
        captured = rows
        if scope is not None:
            captured = count_rows(scope.resolve(prompt_tokens, rows, event.places(self._special_token_ids)), rows)
        return self._capture_row_bytes * self._pooling.row_count(captured) * (event.sampling.n or 1)

    def _next_capture(self) -> int:
        self._capture += 1
        return self._capture - 1

    def _numbered(self, response: generation_pb2.GenerateResponse) -> generation_pb2.GenerateResponse:
        response.sequence = next(self._numbers)
        return response


def heartbeat(number: int) -> generation_pb2.GenerateResponse:
    """A response without content, with its number in the stream; it shows that the request waits or runs."""
    return generation_pb2.GenerateResponse(sequence=number, heartbeat=generation_pb2.Heartbeat())


class EventReader:
    """Turns the responses of one Generate call into events and checks the rules of the contract."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._is_rows_only = False
        self._generated: Counter[int] = Counter()  # output -> tokens
        self._sequence = 0
        self._is_started = False
        self._is_completed = False
        self._blocks = BlockReader()

    def event(self, response: Response) -> WireEvent | None:
        """The event that `response` completes, if any; raises EngineFailed (BAD_STREAM) for a broken rule."""
        if isinstance(response, ChunkResponse):
            self._check_order(response.sequence, "capture_chunk")
            return self._blocks.chunk(response.chunk)
        self._check_order(response.sequence, response.WhichOneof("event"))
        match response.WhichOneof("event"):
            case "token":
                self._generated[response.token.output_index] += len(response.token.token_ids)
                return _token_from_proto(response.token)
            case "started":
                return self._started(response.started)
            case "prompt_logprobs":
                return _prompt_logprobs_from_proto(response.prompt_logprobs)
            case "capture_chunk":
                return self._blocks.chunk(chunk_from_proto(response.capture_chunk))
            case "capture_shm":
                return self._blocks.region(response.capture_shm)
            case "capture_held":
                return self._held(response.capture_held)
            case "capture_labels":
                return labels_from_proto(response.capture_labels)
            case "finished":
                return _finished_from_proto(response.finished)
            case "completed":
                return self._completed(response.completed)
        return None  # a heartbeat, or a kind that a later revision added

    def check_complete(self) -> None:
        """Raises EngineFailed (BAD_STREAM) unless Completed was received."""
        if not self._is_completed:
            raise bad_stream("the response stream ended before the request was complete")

    def _check_order(self, sequence: int, kind: str | None) -> None:
        if sequence != self._sequence:
            raise wrong_sequence(sequence, self._sequence)
        self._sequence += 1
        if self._is_completed:
            raise bad_stream("a response followed Completed")
        if not self._is_started and kind not in ("started", "heartbeat", None):
            raise bad_stream("the response stream does not begin with Started")

    def _started(self, message: generation_pb2.Started) -> Started:
        if self._is_started:
            raise bad_stream("Started was received twice")
        self._is_started = True
        self._prompt_tokens = len(message.prompt_token_ids)
        self._is_rows_only = message.sampling.HasField("max_tokens") and not message.sampling.max_tokens
        try:
            return _started_from_proto(message)
        except InvalidRequest as error:
            raise bad_stream(f"Started is not valid: {error}") from error

    def _held(self, message: capture_pb2.CaptureHeld) -> StoredCaptureNotice:
        generated = self._generated[message.output_index]  # complete by now
        if self._is_rows_only and message.spans:  # the prompt was computed, and no token was generated
            return held_from_proto(message, self._prompt_tokens, self._prompt_tokens)
        return held_from_proto(message, self._prompt_tokens, rows_fed(self._prompt_tokens, generated))

    def _completed(self, message: generation_pb2.Completed) -> Completed:
        if not self._blocks.is_empty:
            raise bad_stream("the request completed before its captures were complete")
        self._is_completed = True
        return _completed_from_proto(message)


async def events_from_responses(
    responses: AsyncIterable[Response | None],
) -> AsyncGenerator[WireEvent, None]:
    """The events of a response stream; raises EngineFailed (BAD_STREAM) at the first broken rule of the contract.

    Does not close `responses`. gRPC yields None for a message that it cannot read.
    """
    reader = EventReader()
    async for response in responses:
        if response is None:
            raise unreadable()
        event = reader.event(response)
        if event is not None:
            yield event
    reader.check_complete()


def _started_to_proto(event: Started, cancel_token: bytes, capture_bytes_limit: int) -> generation_pb2.Started:
    return generation_pb2.Started(
        request_id=event.request_id,
        cancel_token=cancel_token,
        prompt_token_ids=event.prompt_token_ids,
        sampling=sampling_to_proto(event.sampling),
        message_boundaries=boundaries_to_proto(event.message_boundaries),
        capture_bytes_limit=capture_bytes_limit,
        capture_delivery=delivery_to_proto(event.capture_delivery),
        shared_memory_fallback=fallback_to_proto(event.shared_memory_fallback),
        vectors_stored=event.vectors_stored,
        generation_config=event.generation_config,
        instance=event.instance,
        boundaries_missing_reason=event.boundaries_missing_reason,
    )


def _started_from_proto(message: generation_pb2.Started) -> Started:
    return Started(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_proto(message.sampling),
        message_boundaries=boundaries_from_proto(message.message_boundaries),
        capture_delivery=delivery_from_proto(message.capture_delivery),
        shared_memory_fallback=fallback_from_proto(message.shared_memory_fallback),
        vectors_stored=message.vectors_stored,
        generation_config=message.generation_config,
        instance=message.instance,
        boundaries_missing_reason=message.boundaries_missing_reason,
    )


def _token_from_proto(message: generation_pb2.TokenDelta) -> TokenDelta:
    return TokenDelta(
        output_index=message.output_index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_logprob_from_proto, message.logprobs)),
    )


def _entries_per_message(logprobs: Sequence[TokenLogprob]) -> int:
    return max(1, LOGPROBS_PER_MESSAGE // (1 + max((len(one.top) for one in logprobs), default=0)))


def _deltas(event: TokenDelta) -> Iterator[TokenDelta]:
    """The delta in parts that are messages of a bounded size; its text begins in the last one that has tokens."""
    size = _entries_per_message(event.logprobs) if event.logprobs else TOKENS_PER_MESSAGE
    texts = [event.text[start : start + MOST_TEXT] for start in range(0, len(event.text), MOST_TEXT)] or [""]
    for start in range(0, max(len(event.token_ids), 1), size):
        end = start + size
        yield replace(
            event,
            text=texts.pop(0) if end >= len(event.token_ids) else "",
            token_ids=event.token_ids[start:end],
            logprobs=event.logprobs[start:end],
        )
    for text in texts:
        yield replace(event, text=text, token_ids=(), logprobs=())


def _parts(event: PromptLogprobs) -> Iterator[PromptLogprobs]:
    """The log-probabilities of a prompt in parts that are messages of a bounded size."""
    size = _entries_per_message(event.logprobs)
    for start in range(0, len(event.logprobs), size):
        yield PromptLogprobs(first_position=event.first_position + start, logprobs=event.logprobs[start : start + size])


def _prompt_logprobs_to_proto(event: PromptLogprobs) -> generation_pb2.PromptLogprobs:
    return generation_pb2.PromptLogprobs(
        first_position=event.first_position, logprobs=map(_logprob_to_proto, event.logprobs)
    )


def _prompt_logprobs_from_proto(message: generation_pb2.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(
        first_position=message.first_position, logprobs=tuple(map(_logprob_from_proto, message.logprobs))
    )


def _logprob_to_proto(entry: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top=[
            generation_pb2.TopLogprob(token_id=token, logprob=logprob, text=text, rank=rank)
            for token, logprob, text, rank in entry.top
        ],
        text=entry.text,
        rank=entry.rank,
    )


def _logprob_from_proto(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=message.token_id,
        logprob=message.logprob,
        top=tuple(TopLogprob(top.token_id, top.logprob, top.text, top.rank) for top in message.top),
        text=message.text,
        rank=message.rank,
    )


def _finished_to_proto(event: OutputFinished) -> generation_pb2.OutputFinished:
    return generation_pb2.OutputFinished(
        output_index=event.output_index,
        reason=_REASON_TO_PROTO[event.reason],
        stop_string=event.stop if isinstance(event.stop, str) else None,
        stop_token_id=event.stop if isinstance(event.stop, int) else None,
        receipt=receipt_to_proto(event.receipt),
    )


def _finished_from_proto(message: generation_pb2.OutputFinished) -> OutputFinished:
    kind = message.WhichOneof("stop")
    return OutputFinished(
        output_index=message.output_index,
        reason=_REASON_FROM_PROTO.get(message.reason, FinishReason.OTHER),
        stop=getattr(message, kind) if kind is not None else None,
        receipt=receipt_from_proto(message.receipt),
    )


def _completed_to_proto(event: Completed) -> generation_pb2.Completed:
    return generation_pb2.Completed(
        usage=generation_pb2.Usage(
            prompt_tokens=event.usage.prompt_tokens,
            completion_tokens=event.usage.completion_tokens,
            cached_tokens=event.usage.cached_tokens,
        )
    )


def _completed_from_proto(message: generation_pb2.Completed) -> Completed:
    return Completed(
        usage=Usage(
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            cached_tokens=message.usage.cached_tokens,
        )
    )
