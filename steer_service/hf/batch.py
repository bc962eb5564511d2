"""Runs requests on a transformers model, in a thread of its own: waiting requests share a batch.

B: outputs of the batch; T: tokens that each output feeds to the model; V: vocabulary; D: hidden size.
"""

import inspect
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from steer_service.core.backend import ModelInfo
from steer_service.core.errors import EngineFailed, SteerError, closed_error
from steer_service.hf.layers import Change, ResidualHooks
from steer_service.hf.outputs import BatchRequest, OutputRun
from steer_service.hf.programs import TorchProgram
from steer_service.runtime.token_texts import TokenizerTexts

MAX_ROWS = 32
"""Outputs of one batch at most; a request beyond them waits for the next batch."""

MAX_PROMPT_LOGITS = 1 << 27
"""Logits of a batch whose prompts are scored, padding included, unless it is one request; 512 MiB in float32."""


class BatchRunner:
    """Takes requests from any thread and runs them; a batch runs to its end before the next begins."""

    def __init__(self, model: nn.Module, hooks: ResidualHooks, tokenizer: Any, info: ModelInfo) -> None:
        self._model = model
        self._hooks = hooks
        self._tokenizer = tokenizer
        self._texts = TokenizerTexts(tokenizer)
        self._info = info
        # Without this option, transformers computes logits at every position of a prompt.
        has_option = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if has_option else {}
        self._waiting: list[BatchRequest] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def add(self, request: BatchRequest) -> None:
        """Queues a request for the next batch with room; raises EngineFailed after `close`."""
        with self._changed:
            if self._is_closed:
                raise closed_error("the model")
            self._waiting.append(request)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="steerllm-hf", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Ends running and waiting requests with EngineFailed; calling it again does nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while requests := self._next():
            try:
                self._run_batch(requests)
            except SteerError as error:
                _fail(requests, error)
            except Exception as error:
                _fail(requests, EngineFailed(f"the model failed on this batch: {type(error).__name__}"), error)
        _fail(self._waiting, closed_error("the model"))

    def _next(self) -> list[BatchRequest]:
        """Waits for the requests of the next batch, oldest first; empty after `close`."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            requests: list[BatchRequest] = []
            while self._waiting and not self._is_closed:
                if requests and not self._fits([*requests, self._waiting[0]]):
                    break
                requests.append(self._waiting.pop(0))
            return requests

    def _fits(self, requests: Sequence[BatchRequest]) -> bool:
        """True if the requests may share a batch."""
        rows = sum(len(request.prepared.outputs) for request in requests)
        if not any(request.scores_prompt for request in requests):
            return rows <= MAX_ROWS
        longest = max(request.prepared.rows.prompt_tokens for request in requests)
        return rows <= MAX_ROWS and rows * longest * self._info.vocab_size <= MAX_PROMPT_LOGITS

    def _run_batch(self, requests: list[BatchRequest]) -> None:
        device = next(self._model.parameters()).device
        self._begin(requests)
        outputs = [output for request in requests for output in request.outputs if not output.is_over]
        with torch.inference_mode(), evaluating(self._model), self._hooks.instead(_change_of(outputs)):
            cache, mask_BT = None, torch.empty((len(outputs), 0), dtype=torch.int64, device=device)
            while not all(output.is_over for output in outputs):
                if self._is_closed:
                    raise closed_error("the model")
                if late := self._take_late():
                    requests += late  # they need no batch, but fail with this one
                    self._begin(late)
                ids_BT, added_BT = _padded([output.next_tokens for output in outputs], device)
                mask_BT = torch.cat([mask_BT, added_BT], dim=1)
                positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
                scores_prompts = cache is None and any(request.scores_prompt for request in requests)
                result = self._model(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    position_ids=positions_BT,
                    past_key_values=cache,
                    use_cache=True,
                    **({} if scores_prompts else self._options),
                )
                cache = result.past_key_values
                if scores_prompts:
                    _score_prompts(outputs, result.logits)
                _step(outputs, result.logits[:, -1].float().cpu())
                _end_over_budget(requests)

    def _begin(self, requests: Sequence[BatchRequest]) -> None:
        """Makes the outputs of the requests, and ends those whose time budget is over."""
        device = next(self._model.parameters()).device
        eos = _end_tokens(self._model, self._tokenizer)
        for request in requests:
            steering, count = request.prepared.steering, len(request.prepared.outputs)
            program = TorchProgram(steering, device) if steering is not None else None
            request.outputs = [
                OutputRun(request, index, program, self._texts, eos, self._info) for index in range(count)
            ]
        _end_over_budget(requests)

    def _take_late(self) -> list[BatchRequest]:
        """Takes the waiting requests whose time budget is over from the queue."""
        with self._changed:
            late = [request for request in self._waiting if request.prepared.budget.is_over]
            self._waiting = [request for request in self._waiting if request not in late]
        return late


def _score_prompts(outputs: Sequence[OutputRun], logits_BTV: torch.Tensor) -> None:
    for output, logits_TV in zip(outputs, logits_BTV, strict=True):
        if not output.is_over:
            output.score_prompt(logits_TV)


def _step(outputs: Sequence[OutputRun], logits_BV: torch.Tensor) -> None:
    for output, logits_V in zip(outputs, logits_BV, strict=True):
        if not output.is_over:
            try:
                output.step(logits_V)
            except SteerError as error:
                output.request.fail(error)


def _end_over_budget(requests: Sequence[BatchRequest]) -> None:
    """Ends the outputs whose time budget is over, and completes the requests whose outputs are over."""
    for request in requests:
        for output in request.outputs:
            try:
                output.end_if_over_budget()
            except SteerError as error:
                request.fail(error)
        request.complete_if_over()


def _change_of(outputs: Sequence[OutputRun]) -> Change:
    """The hooks' function for a batch: output `i` is row `i` of its tensors, padded on the left."""

    def change(layer: int, stream_BTD: torch.Tensor) -> torch.Tensor:
        changed_BTD = stream_BTD
        for row, output in enumerate(outputs):
            if output.is_over or output.work.is_idle_at(layer):
                continue
            count = len(output.next_tokens)
            try:
                new_TD = output.work.change(layer, stream_BTD[row, -count:])
            except SteerError as error:
                output.request.fail(error)
                continue
            if new_TD is not None:
                if changed_BTD is stream_BTD:
                    changed_BTD = stream_BTD.clone()
                changed_BTD[row, -count:] = new_TD
        return changed_BTD

    return change


def _padded(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 of shape [B, T], padded on the left."""
    longest = max(map(len, tokens))
    ids_BT = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tokens], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens], device=device)
    return ids_BT, mask_BT


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an output unless `ignore_eos` is set."""
    config = getattr(model, "generation_config", None)
    known = getattr(config, "eos_token_id", None)
    ends = known if isinstance(known, (list, tuple)) else [known]
    vocab_size = model.config.get_text_config().vocab_size  # a tokenizer may have more ids than its model
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None and token < vocab_size)


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Within the block every module is in evaluation mode, without dropout; afterwards each has its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _fail(requests: Sequence[BatchRequest], error: SteerError, cause: BaseException | None = None) -> None:
    error.__cause__ = cause
    for request in requests:
        request.fail(error)
