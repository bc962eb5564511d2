"""A transformers model as a backend: requests on it are steered and captured in the caller's process."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from steer_service.core.backend import ModelInfo
from steer_service.core.checks import check_priority, check_structured
from steer_service.core.errors import closed_error
from steer_service.core.events import Completed, Event
from steer_service.core.json_fields import JsonObject
from steer_service.core.number_limits import MAX_LOGPROBS
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.hf.batch import BatchRunner
from steer_service.hf.layers import decoder_layers
from steer_service.hf.outputs import BatchRequest
from steer_service.hf.trainable_model import TrainableModel
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.chat_defaults import ChatDefaults
from steer_service.runtime.output_events import started
from steer_service.runtime.prepare import prepare
from steer_service.runtime.prompt_reader import PromptReader
from steer_service.runtime.prompt_renderer import PromptRenderer
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.runtime.spaced_deltas import spaced
from steer_service.runtime.token_texts import special_token_ids

NO_LIMIT = 1 << 20
"""Limits on programs and operations, which transformers does not have."""

DEFAULT_MAX_LEN = 2048
"""Tokens of a sequence, for a model whose config does not say."""


class HFSteeringModel(TrainableModel, SteeringCalls):
    """A causal LM of transformers that generates with steering, and whose steering can be trained.

    `generate`, `chat`, `stream` and `submit` steer with the spec of each request alone, as every other backend does.
    They do not apply trained steering; `to_spec()` makes a spec of it. `TrainableModel` describes the training.

    Layer L is the residual stream after decoder layer L, counted from 0: transformers' `hidden_states[L + 1]`, but for
    the last layer, where transformers returns the normed one. One thread runs generations; another may train.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        target_layers: Iterable[int] = (),
        init_scale: float = 0.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        chat_template: str | None = None,
        default_chat_template_kwargs: JsonObject | str | None = None,
        **model_kwargs: Any,
    ) -> None:
        """`model`: a folder or name, loaded by transformers with `model_kwargs`, its own arguments; or a loaded model.

        `target_layers` and `init_scale` are those of `TrainableModel`, and so are the errors. `tokenizer` is by
        default loaded from where the model came from. `name` is by default the folder or name of the model.
        `chat_template`: name of a file or a template's text, in place of the tokenizer's own template;
        `default_chat_template_kwargs`: its arguments where a chat does not give them, which it need not use.
        """
        chats = ChatDefaults.of(chat_template, default_chat_template_kwargs)
        if isinstance(model, nn.Module):
            loaded, source = model, getattr(model, "name_or_path", "")
        else:
            loaded, source = AutoModelForCausalLM.from_pretrained(model, **model_kwargs), str(model)
        info = _info_of(loaded, len(decoder_layers(loaded)), name or source)
        super().__init__(loaded, info, target_layers=target_layers, init_scale=init_scale)
        self.chats = chats
        """The template and the arguments in force where a chat says nothing."""
        self._tokenizer = tokenizer
        self._source = source
        self._knows_tokenizer = False
        self._prompts: PromptRenderer | None = None
        self._reading: PromptReader | None = None
        self._runner: BatchRunner | None = None

    @property
    def info(self) -> ModelInfo:
        """Facts about the model. Loads the tokenizer, for what it knows; a model without one has no such facts."""
        if not self._knows_tokenizer:
            self._knows_tokenizer = True
            with suppress(OSError, ValueError):  # transformers' errors where there is no tokenizer
                ids = special_token_ids(self.tokenizer, self._info.vocab_size)
                has_chats = self.chats.has_chats(self.tokenizer)
                self._info = replace(self._info, special_token_ids=ids, has_chat_template=has_chats)
        return self._info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; loaded on first use unless one was given."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._source)
        return self._tokenizer

    def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of one request, from Started to Completed; requests that wait share a batch.

        Closing the iterator aborts the request. Raises a SteerError.
        """
        return spaced(self._submit(request), request.stream_interval)

    async def _submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if self._is_closed:
            raise closed_error("the model")
        check_priority(request, has_priority=False)
        check_structured(request, is_served=False)
        prepared = await prepare(request, self.info, self._render)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()
        running = BatchRequest(
            prepared=prepared,
            emit=lambda event: _put(loop, events, event),
            bad_words=self._renderer().bad_words(prepared.options),
        )
        yield started(prepared, request.request_id or uuid.uuid4().hex)
        self._running().add(running)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Completed):
                    return
        finally:
            running.is_over = True

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """The tokens of a prompt, those that `submit` gives to the model; raises the SteerErrors of such a prompt."""
        return await self._reader().tokens_of(request)

    async def text_of(self, request: DetokenizeRequest) -> str:
        """The text of tokens; raises InvalidRequest for ids that the model does not have, or too many."""
        return await self._reader().text_of(request)

    async def close(self) -> None:
        """Ends running requests and removes the hooks from the model; calling it again does nothing."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """`close` for callers that are not asynchronous."""
        self._is_closed = True
        if self._runner is not None:
            self._runner.close()
        super().close_sync()

    async def _render(self, request: GenerateRequest) -> RenderedPrompt:
        return await self._renderer().render(request)

    def _renderer(self) -> PromptRenderer:
        if self._prompts is None:
            self._prompts = PromptRenderer(self.tokenizer, self._info, self.chats)
        return self._prompts

    def _reader(self) -> PromptReader:
        if self._reading is None:
            self._reading = PromptReader(self.tokenizer, self._info, self.chats)
        return self._reading

    def _running(self) -> BatchRunner:
        if self._runner is None:
            self._runner = BatchRunner(self.model, self._hooks, self.tokenizer, self._info)
        return self._runner

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_sync()


def _put(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event | BaseException]", event: Any) -> None:
    if not loop.is_closed():  # its caller is gone, and with it the loop
        loop.call_soon_threadsafe(events.put_nowait, event)


def _info_of(model: Any, layer_count: int, name: str) -> ModelInfo:
    config = model.config.get_text_config()
    return ModelInfo(
        name=name or type(model).__name__,
        architecture=type(model).__name__,
        layer_count=layer_count,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LEN,
        dtype=str(model.dtype).removeprefix("torch."),
        max_logprobs=min(MAX_LOGPROBS, config.vocab_size),
        max_programs=NO_LIMIT,
        max_operations=NO_LIMIT,
        max_operations_per_layer=NO_LIMIT,
    )
