"""Captures prompt after prompt into a folder: several requests at a time, their rows in the prompts' order."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_client import AsyncSteerClient
from steer_service.cli.arguments import UsageError
from steer_service.cli.capture.prompts import ParsedPrompt, PromptLine, PromptSource
from steer_service.cli.capture.shards import CaptureFolder, ShardBuffer
from steer_service.cli.progress import CaptureProgress, say
from steer_service.cli.retry import RetryPolicy
from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CapturedRows, CaptureSite, CaptureSpec
from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.positions import positions_of
from steer_service.core.prompt import Prompt
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection
from steer_service.formats.capture_dataset import tensor_name
from steer_service.runtime.calls import Generation, checked_events, collect

FATAL = frozenset({"UNKNOWN_MODEL", "UNKNOWN_FIELD", "UNKNOWN_METHOD", "NOT_BUILT", "NO_SHARED_MEMORY"})
"""Reasons of errors that every other prompt would meet as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much at a time."""

    concurrency: int
    """Requests under way, those included whose rows wait for an earlier one's."""
    shard_bytes: int
    """Bytes of a shard at most; the rows of one prompt stay together."""
    fail_fast: bool
    """True: the first prompt that fails ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one prompt."""

    line: PromptLine
    """Where it stands."""
    asked: ParsedPrompt
    """What it asked for."""
    rows: CapturedRows = field(default_factory=CapturedRows)
    """What was captured."""
    generation: Generation | None = None
    """What else came; None if it failed."""
    error: SteerError | None = None
    """Why it failed."""


class PromptFailed(Exception):
    """A prompt failed, and the run was to stop at the first that does; the message says which and why."""


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
    ) -> None:
        """`request` is what is asked of every prompt in place of its own; `about`, as JSON, goes into every shard.

        A server may be lost for `retry_timeout_s`.
        """
        assert request.capture is not None
        assert request.capture.dtype is not None, "so that every answer is checked for it"
        self._client = client
        self._model = model
        self._request = request
        self._capture: CaptureSpec = request.capture
        self._folder = folder
        self._limits = limits
        self._retries = RetryPolicy(retry_timeout_s, say)
        self._progress = progress
        self._about = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        self._buffer = ShardBuffer(
            dict.fromkeys(_names(self._capture), dtype_from_name(request.capture.dtype)),
            model.hidden_size,
            limits.shard_bytes,
        )
        self._covered = folder.next_prompt, folder.digest  # prompts taken, and the digest of the last of them
        self.failed = folder.failed
        """Prompts that failed, those of earlier runs included."""
        self.deliveries: set[str] = set()
        """How rows came."""

    @property
    def covered(self) -> int:
        """Prompts that were captured or have failed."""
        return self._covered[0]

    async def run(self, source: PromptSource) -> None:
        """Captures what is left of `source`; however it ends, what has come in order by then is kept.

        Raises UsageError if `source` does not begin with the prompts that the folder covers, PromptFailed, the
        SteerError that ends the run, or OSError if the folder cannot be written.
        """
        lines = self._left(source)
        try:
            await self._answer_all(lines, source)
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

    async def _answer_all(self, lines: Iterator[PromptLine], source: PromptSource) -> None:
        window: deque[asyncio.Task[Answer]] = deque()
        try:
            for line in lines:
                if len(window) >= self._limits.concurrency:
                    await self._take(window)
                window.append(asyncio.ensure_future(self._answer(line, source.read(line))))
            while window:
                await self._take(window)
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def _answer(self, line: PromptLine, asked: ParsedPrompt) -> Answer:
        """What comes of one prompt; raises the SteerError that ends the run."""
        if isinstance(asked.prompt, SteerError):
            return Answer(line=line, asked=asked, error=asked.prompt)
        prompt = asked.prompt
        try:
            generation, rows = await self._retries.repeat(lambda: self._captured(prompt))
        except SteerError as error:
            if error.reason in FATAL or self._retries.is_lost(error):
                raise
            return Answer(line=line, asked=asked, error=error)
        return Answer(line=line, asked=asked, generation=generation, rows=rows)

    async def _captured(self, prompt: Prompt) -> tuple[Generation, CapturedRows]:
        generation = await collect(checked_events(self._client, replace(self._request, prompt=prompt)))
        [output] = generation.outputs
        rows = output.captured
        if output.held is not None:
            # The lease ends at once, also where an earlier prompt's rows are not there yet: what waits here may not use
            # up the memory without which they cannot come. The mapping stays.
            try:
                rows = await output.held.rows()
            finally:
                with contextlib.suppress(SteerError):
                    await output.held.release()
        return generation, rows

    async def _take(self, window: "deque[asyncio.Task[Answer]]") -> None:
        """Puts the first of the answers into the shard."""
        answer = await window[0]
        window.popleft()
        if answer.error is not None:
            self._fail(answer, answer.error)
            if self._limits.fail_fast:
                raise PromptFailed(f"prompt {answer.line.index} (line {answer.line.number}) failed: {answer.error}")
        else:
            await self._keep(answer)
        self._covered = answer.line.index + 1, answer.line.digest

    async def _keep(self, answer: Answer) -> None:
        assert answer.generation is not None
        tensors = self._tensors(answer)
        if not self._buffer.has_room(len(tensors["position"])):
            await self._flush()
        self._buffer.add(tensors, _said_of(answer, answer.generation))
        [output] = answer.generation.outputs
        self._note_delivery(answer.generation)
        self._progress.advance(tokens=output.receipt.rows_total, nbytes=answer.rows.nbytes)

    def _tensors(self, answer: Answer) -> dict[str, npt.NDArray[Any]]:
        """The rows of one prompt and their labels; raises EngineFailed for rows of another width."""
        assert answer.generation is not None
        tensors = self._labels(answer, answer.generation)
        shape = len(tensors["position"]), self._model.hidden_size
        for layer in self._capture.layers:
            for site in self._capture.site.parts:
                arrays = answer.rows.before if site is CaptureSite.BEFORE else answer.rows.after
                if arrays[layer].shape != shape:
                    raise EngineFailed(f"rows came as {arrays[layer].shape}, expected {shape}", reason="INCOMPLETE")
                tensors[tensor_name(layer, site)] = arrays[layer]
        return tensors

    def _labels(self, answer: Answer, generation: Generation) -> dict[str, npt.NDArray[Any]]:
        """Those that the answer was checked against, whether the server sends any or not."""
        [output] = generation.outputs
        prompt_tokens, max_tokens = len(generation.prompt_token_ids), generation.sampling.max_tokens or 1
        steered = RowSelection.of(self._request, prompt_tokens, prompt_tokens + max_tokens - 1).steered
        positions = positions_of(answer.rows.spans)
        is_steered = np.zeros(len(positions), np.bool_)
        for first, end in steered:
            is_steered |= (positions >= first) & (positions < end)
        return {
            "prompt_index": np.full(len(positions), answer.line.index, np.int64),
            "position": positions,
            "token_id": np.array([*generation.prompt_token_ids, *output.token_ids], np.int32)[positions],
            "is_generated": positions >= prompt_tokens,
            "is_steered": is_steered,
        }

    def _fail(self, answer: Answer, error: SteerError) -> None:
        record = {
            "prompt_index": answer.line.index,
            "line": answer.line.number,
            "id": answer.asked.id,
            "error": type(error).__name__,
            "reason": error.reason,
            "field": error.field,
            "message": error.message,
        }
        self._folder.put_error(record)
        self.failed += 1
        self._progress.advance(failed=True)

    def _note_delivery(self, generation: Generation) -> None:
        delivery, fallback = generation.capture_delivery, generation.shared_memory_fallback
        if delivery is not None:
            self.deliveries.add("through shared memory" if delivery.is_shared else "inline")
        if fallback is not None and fallback.value not in self.deliveries:
            self.deliveries.add(fallback.value)
            say(f"captures come inline, not through shared memory: {fallback.value}")

    async def _flush(self) -> None:
        """Writes the shard, if there is any; to its end even if this task is cancelled meanwhile."""
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

    def _write(self) -> None:
        end, digest = self._covered
        prompts = b"".join(self._buffer.prompts)
        self._folder.put(self._buffer.tensors(), prompts, end=end, digest=digest, about=self._about)


def _names(capture: CaptureSpec) -> list[str]:
    return [tensor_name(layer, site) for layer in capture.layers for site in capture.site.parts]


def _said_of(answer: Answer, generation: Generation) -> dict[str, Any]:
    """What the shard's list of prompts says of one, but for its place there."""
    [output] = generation.outputs
    said: dict[str, Any] = {
        "prompt_index": answer.line.index,
        "id": answer.asked.id,
        "prompt_tokens": len(generation.prompt_token_ids),
        "generated_tokens": len(output.token_ids),
        "generated_text": output.text,
        "finish_reason": output.finish_reason.value,
    }
    if generation.message_boundaries:
        said["messages"] = [
            {"role": one.role, "start": one.start_token, "end": one.end_token} for one in generation.message_boundaries
        ]
    if answer.asked.fields:
        said["fields"] = dict(answer.asked.fields)
    return said
