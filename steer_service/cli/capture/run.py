"""Captures prompts into a folder: several requests at a time, their rows in the order of the prompts."""

import asyncio
import contextlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_client import AsyncSteerClient
from steer_service.cli.arguments import UsageError
from steer_service.cli.capture.lines_ahead import LinesAhead
from steer_service.cli.capture.long_texts import tokens_of_text
from steer_service.cli.capture.prompts import ParsedPrompt, PromptLine, PromptSource
from steer_service.cli.capture.shards import CaptureFolder, ShardBuffer
from steer_service.cli.capture.windows import Cutting, Window, advice_for, check_can_be_cut, requests_of
from steer_service.cli.progress import CaptureProgress, print_message
from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CapturedRows, CaptureSite, CaptureSpec, Pooling
from steer_service.core.errors import EngineFailed, InvalidRequest, SteerError
from steer_service.core.prompt import ChatPrompt, Prompt, TokenPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.prompt_tokens import PromptTokens
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection, rows_at_most
from steer_service.core.spans import positions_of
from steer_service.formats.capture_dataset import WINDOW, WINDOW_LABELS, tensor_name
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from steer_service.runtime.retry import RetryPolicy

FATAL = frozenset({"UNKNOWN_MODEL", "UNKNOWN_FIELD", "UNKNOWN_METHOD", "NOT_BUILT", "NO_SHARED_MEMORY"})
"""Reasons of errors that every other prompt would meet too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on what runs and is held at a time."""

    concurrency: int
    """Requests in flight, including those whose rows wait for an earlier prompt's."""
    shard_bytes: int
    """Most bytes of a shard; the rows of one prompt stay together."""
    shard_seconds: float
    """Seconds after the first rows of a shard when it is written, however small it is."""
    fail_fast: bool
    """True: the first prompt that fails ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one request returned: a whole prompt, or a window of one that was cut."""

    request: GenerateRequest
    """The request."""
    generation: Generation
    """The response."""
    rows: CapturedRows
    """The captured rows."""
    window: Window | None = None
    """Which part of the text it is; None for a whole prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """The result for one prompt."""

    line: PromptLine
    """Its line in the file."""
    parsed: ParsedPrompt
    """The prompt."""
    parts: tuple[Part, ...] = ()
    """One for a whole prompt, one for each window of a prompt that was cut; empty if the prompt failed."""
    tokens: int = 0
    """Tokens of a prompt that was cut to windows; 0 for others."""
    error: SteerError | None = None
    """The error; None if the prompt did not fail."""


class PromptFailed(Exception):
    """A prompt failed in a run that stops at the first failure; the message names the prompt and the error."""


class CaptureRun:
    """One run over the prompts that a folder does not cover yet."""

    def __init__(
        self,
        client: AsyncSteerClient,
        model: ModelInfo,
        request: GenerateRequest,
        folder: CaptureFolder,
        limits: Limits,
        progress: CaptureProgress,
        retry_timeout_s: float,
        about: Mapping[str, Any],
        cutting: Cutting | None = None,
        sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
    ) -> None:
        """`request` is sent with each prompt in place of its own. `about` goes into every shard, as JSON.

        `cutting`: what becomes of long texts; None: they fail. `sleep`: waits for a number of seconds.

        A server may be lost for `retry_timeout_s`.
        """
        assert request.capture is not None
        assert request.capture.dtype is not None, "so that every response is checked for it"
        self._client = client
        self._model = model
        self._request = request
        self._capture: CaptureSpec = request.capture
        self._folder = folder
        self._cutting = cutting
        self._limits = limits
        self._retries = RetryPolicy(retry_timeout_s, print_message)
        self._progress = progress
        self._about = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        self._buffer = ShardBuffer(
            dict.fromkeys(
                _names(self._capture), dtype_from_name(self._capture.pooling.dtype_of(request.capture.dtype))
            ),
            model.hidden_size,
            limits.shard_bytes,
            WINDOW_LABELS if cutting is not None and cutting.context else {},
        )
        self._sleep = sleep
        self._due: asyncio.Task[None] | None = None  # ends when the shard is to be written; None while it is empty
        self._covered = folder.next_prompt, folder.digest  # prompts covered, and the digest of the last of them
        self.failed = folder.failed
        """Prompts that failed, in this and in earlier runs."""
        self.deliveries: set[str] = set()
        """How rows were delivered."""

    @property
    def covered(self) -> int:
        """Prompts that were captured or failed."""
        return self._covered[0]

    async def run(self, source: PromptSource) -> None:
        """Captures the rest of `source`. However it ends, the results that came in order are kept.

        Raises UsageError if `source` does not begin with the prompts that the folder covers, PromptFailed, the
        SteerError that ends the run, or OSError if the folder cannot be written.
        """
        lines = self._left(source)
        try:
            await self._capture_all(lines, source)
        except OSError:  # nothing can be written
            raise
        except BaseException:
            await self._flush()
            raise
        await self._flush()

    def _left(self, source: PromptSource) -> Iterator[PromptLine]:
        """The prompts that the folder does not cover."""
        count, digest = self._covered
        if not count:
            return source.lines
        last = next((line for line in source.lines if line.index + 1 == count), None)
        if last is None or last.digest != digest:
            raise UsageError(
                f"--out: {self._folder.path} covers {count} prompts, which are not those that PROMPTS begins with"
            )
        return source.lines

    async def _capture_all(self, lines: Iterator[PromptLine], source: PromptSource) -> None:
        window: deque[asyncio.Task[PromptResult]] = deque()
        async with LinesAhead(lines, source) as ahead:
            reading: asyncio.Task[PromptLine | None] | None = asyncio.ensure_future(ahead.next())
            try:
                while window or reading is not None:
                    wanted = reading if len(window) < self._limits.concurrency else None
                    one_of = [task for task in (*itertools.islice(window, 1), self._due, wanted) if task is not None]
                    await asyncio.wait(one_of, return_when=asyncio.FIRST_COMPLETED)
                    if self._due is not None and self._due.done():
                        await self._flush()
                    if window and window[0].done():
                        await self._take(window.popleft().result())
                    if wanted is not None and wanted.done():
                        line = wanted.result()
                        reading = None if line is None else asyncio.ensure_future(ahead.next())
                        if line is not None:
                            window.append(asyncio.ensure_future(self._capture_prompt(line, source.read(line))))
            finally:
                running = [task for task in (*window, self._due, reading) if task is not None]
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _capture_prompt(self, line: PromptLine, parsed: ParsedPrompt) -> PromptResult:
        """The result for one prompt; raises the SteerError that ends the run."""
        if isinstance(parsed.prompt, SteerError):
            return PromptResult(line=line, parsed=parsed, error=parsed.prompt)
        try:
            parts, tokens = await self._parts(parsed.prompt)
        except SteerError as error:
            if error.reason in FATAL or self._retries.is_lost(error):
                raise
            return PromptResult(line=line, parsed=parsed, error=error)
        return PromptResult(line=line, parsed=parsed, parts=parts, tokens=tokens)

    async def _parts(self, prompt: Prompt) -> tuple[tuple[Part, ...], int]:
        """What was captured of a prompt, and the number of its tokens if it was cut to windows, else 0."""
        cutting, whole = self._cutting, replace(self._request, prompt=prompt)
        limit = self._model.max_prompt_tokens if cutting is None else cutting.limit(self._model)
        tokens = await self._tokens_of(prompt) if limit < self._model.max_prompt_tokens else None
        if tokens is None or len(tokens) <= limit:
            try:
                return (await self._retries.repeat(lambda: self._captured(whole)),), 0
            except InvalidRequest as error:
                if error.reason != "PROMPT_TOO_LONG" or cutting is None:
                    raise
        check_can_be_cut(prompt)
        if tokens is None:
            tokens = await self._tokens_of(prompt)
        assert cutting is not None
        assert tokens is not None
        parts = []
        for window, request in requests_of(self._request, tokens, cutting, self._model):
            part = await self._retries.repeat(partial(self._captured, request))
            parts.append(replace(part, window=window))
        return tuple(parts), len(tokens) if cutting.context else 0

    async def _tokens_of(self, prompt: Prompt) -> tuple[int, ...] | None:
        """The tokens of a prompt, or as many as are kept; None for a chat, which is not cut."""
        assert self._cutting is not None
        if isinstance(prompt, ChatPrompt):
            return None
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        limit = self._model.max_prompt_tokens
        return await tokens_of_text(prompt, self._tokenized, limit, None if self._cutting.context else limit)

    async def _tokenized(self, text: str, adds_special: bool) -> PromptTokens:
        return await self._retries.repeat(
            lambda: self._client.tokenize(
                text, add_special_tokens=adds_special, with_token_texts=False, model=self._request.model
            )
        )

    async def _captured(self, request: GenerateRequest) -> Part:
        generation = await collect(checked_events(self._client, request))
        [output] = generation.outputs
        rows = output.captured
        if output.held is not None:
            # The lease ends at once, even if rows of an earlier prompt are missing: rows that wait here must not take
            # the memory that those need. The mapping stays.
            try:
                rows = await output.held.rows()
            finally:
                with contextlib.suppress(SteerError):
                    await output.held.release()
        return Part(request=request, generation=generation, rows=rows)

    async def _take(self, result: PromptResult) -> None:
        """Puts a result into the shard."""
        if result.error is not None:
            self._fail(result, result.error)
            if self._limits.fail_fast:
                raise PromptFailed(f"prompt {result.line.index} (line {result.line.number}) failed: {result.error}")
        else:
            await self._keep(result)
        self._covered = result.line.index + 1, result.line.digest

    async def _keep(self, result: PromptResult) -> None:
        parts = [self._tensors(result.line.index, part) for part in result.parts]
        tensors = parts[0] if len(parts) == 1 else _concatenated(parts, self._buffer.empty())
        if not self._buffer.has_room(len(tensors["position"])):
            await self._flush()
        self._buffer.add(tensors, _prompt_entry(result))
        if self._due is None:
            self._due = asyncio.ensure_future(self._sleep(self._limits.shard_seconds))
        for part in result.parts:
            self._note_delivery(part.generation)
        self._progress.advance(
            tokens=sum(part.generation.outputs[0].receipt.rows_total for part in result.parts),
            nbytes=sum(part.rows.nbytes for part in result.parts),
        )

    def _tensors(self, index: int, part: Part) -> dict[str, npt.NDArray[Any]]:
        """The rows of one part and their labels; raises EngineFailed for rows of another hidden size."""
        tensors = self._labels(index, part)
        shape = len(tensors["position"]), self._model.hidden_size
        for layer in self._capture.layers:
            for site in self._capture.site.parts:
                arrays = part.rows.before if site is CaptureSite.BEFORE else part.rows.after
                if arrays[layer].shape != shape:
                    raise EngineFailed(f"rows came as {arrays[layer].shape}, expected {shape}", reason="INCOMPLETE")
                tensors[tensor_name(layer, site)] = arrays[layer]
        return tensors

    def _labels(self, index: int, part: Part) -> dict[str, npt.NDArray[Any]]:
        """The labels of the rows, as the response was checked against them. The server need not send any."""
        generation, window = part.generation, part.window
        [output] = generation.outputs
        prompt_tokens, max_tokens = len(generation.prompt_token_ids), generation.sampling.max_tokens or 0
        places = PromptPlaces(
            token_ids=generation.prompt_token_ids,
            messages=generation.message_boundaries,
            messages_missing_reason=generation.boundaries_missing_reason,
            special_token_ids=self._model.special_token_ids,
        )
        limit = rows_at_most(prompt_tokens, max_tokens)
        steered = RowSelection.of(part.request, prompt_tokens, limit, places).steered
        positions = positions_of(part.rows.spans)
        if self._capture.pooling is not Pooling.NONE:
            positions = positions[-1:]
        is_steered = np.zeros(len(positions), np.bool_)
        for first, end in steered:
            is_steered |= (positions >= first) & (positions < end)
        return {
            "prompt_index": np.full(len(positions), index, np.int64),
            "position": positions + (window.offset if window is not None else 0),
            "token_id": np.array([*generation.prompt_token_ids, *output.token_ids], np.int32)[positions],
            "is_generated": positions >= prompt_tokens,
            "is_steered": is_steered,
            WINDOW: np.full(len(positions), window.number if window is not None else 0, np.int32),
        }

    def _fail(self, result: PromptResult, error: SteerError) -> None:
        record = {
            "prompt_index": result.line.index,
            "line": result.line.number,
            "id": result.parsed.id,
            "error": type(error).__name__,
            "reason": error.reason,
            "field": error.field,
            "message": error.message,
        }
        if error.reason == "PROMPT_TOO_LONG":
            record["advice"] = advice_for(self._request, self._model)
        self._folder.put_error(record)
        self.failed += 1
        self._progress.advance(failed=True)

    def _note_delivery(self, generation: Generation) -> None:
        delivery, fallback = generation.capture_delivery, generation.shared_memory_fallback
        if delivery is not None:
            self.deliveries.add("through shared memory" if delivery.is_shared else "inline")
        if fallback is not None and fallback.value not in self.deliveries:
            self.deliveries.add(fallback.value)
            print_message(f"captures are sent inline, not through shared memory: {fallback.value}")

    async def _flush(self) -> None:
        """Writes the shard, unless it is empty. If this task is cancelled, the write still completes."""
        if not self._buffer.prompts:
            return
        writing = asyncio.ensure_future(asyncio.to_thread(self._write))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing
            raise
        finally:
            self._buffer.clear()
            if self._due is not None:
                self._due.cancel()
                self._due = None

    def _write(self) -> None:
        end, digest = self._covered
        prompts = b"".join(self._buffer.prompts)
        self._folder.put(self._buffer.tensors(), prompts, end=end, digest=digest, about=self._about)


def _names(capture: CaptureSpec) -> list[str]:
    return [tensor_name(layer, site) for layer in capture.layers for site in capture.site.parts]


def _concatenated(
    parts: Sequence[Mapping[str, npt.NDArray[Any]]], empty: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The rows of all parts, one after the other; `empty`: those of no part."""
    return {name: np.concatenate([part[name] for part in parts]) if parts else none for name, none in empty.items()}


def _prompt_entry(result: PromptResult) -> dict[str, Any]:
    """The entry of one prompt in the shard's list, without its rows."""
    entry: dict[str, Any] = {"prompt_index": result.line.index, "id": result.parsed.id}
    windows = [part.window for part in result.parts if part.window is not None]
    if len(result.parts) == 1 and not result.tokens:
        entry |= _response_entry(result.parts[0])
        if windows:
            entry["truncated"] = True
    else:
        entry |= {
            "prompt_tokens": result.tokens,
            "generated_tokens": 0,
            "generated_text": "",
            "finish_reason": "length",
        }
        entry["windows"] = [
            {"window": one.number, "start": one.start, "end": one.end, "first_captured": one.first} for one in windows
        ]
    if result.parsed.fields:
        entry["fields"] = dict(result.parsed.fields)
    return entry


def _response_entry(part: Part) -> dict[str, Any]:
    generation = part.generation
    [output] = generation.outputs
    entry: dict[str, Any] = {
        "prompt_tokens": len(generation.prompt_token_ids),
        "generated_tokens": len(output.token_ids),
        "generated_text": output.text,
        "finish_reason": output.finish_reason.value,
    }
    if generation.message_boundaries:
        entry["messages"] = [
            {"role": one.role, "start": one.start_token, "end": one.end_token} for one in generation.message_boundaries
        ]
    if generation.boundaries_missing_reason:
        entry["messages_missing_reason"] = generation.boundaries_missing_reason
    if part.rows.pooling is not Pooling.NONE:
        entry["pooled_rows"] = output.receipt.rows_captured
    return entry
