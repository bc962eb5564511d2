"""A transformers model that is steered, read and trained: the calls of every backend, and an nn.Module."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_service.core.arrays import as_vector
from steer_service.core.backend import ModelInfo
from steer_service.core.checks import check_steering
from steer_service.core.errors import InvalidRequest, Unsupported, within
from steer_service.core.events import Completed, Event
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import LayerSteeringSpec, SteeringSpec
from steer_service.formats.checkpoint import Checkpoint, SavedModel, Trained, read_checkpoint, write_checkpoint
from steer_service.hf.batch import BatchRunner, closed_error
from steer_service.hf.layers import StreamHooks, decoder_layers, widened
from steer_service.hf.outputs import BatchRequest
from steer_service.hf.programs import TorchProgram
from steer_service.hf.trainable import TrainableAdd, TrainableSteering, restored
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.output_events import started
from steer_service.runtime.prepare import prepare
from steer_service.runtime.prompts import RenderedPrompt, render_prompt

MANY = 1 << 20
"""What a limit is that transformers do not have."""

DEFAULT_MAX_LEN = 2048
"""Tokens of a sequence, for a model whose config does not say."""


class HFSteeringModel(nn.Module, SteeringCalls):
    """A causal LM of transformers with frozen weights and steering that can be trained.

    Two things in one. As an `nn.Module`, `model(**batch)` is the model's own forward pass, with its loss, through
    the trainable steering of `target_layers`. As a backend, `generate`, `chat`, `stream` and `submit` steer with the
    spec of each request alone, as every other backend does; `to_spec()` makes one of what was trained.

    Layer L is the stream behind decoder layer L, counted from 0. One thread runs generations; another may train.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        target_layers: Iterable[int] = (),
        init_scale: float = 0.0,
        tokenizer: Any = None,
        name: str | None = None,
        **model_kwargs: Any,
    ) -> None:
        """`model`: a folder or name, loaded with `model_kwargs` by transformers, or a loaded model.

        Every target layer gets an addition whose vector is zero or, with `init_scale`, normally distributed noise of
        that size per element. Raises InvalidRequest for a layer that the model does not have, Unsupported for a model
        whose decoder layers are not found.
        """
        super().__init__()
        if isinstance(model, nn.Module):
            loaded, source = model, getattr(model, "name_or_path", "")
        else:
            loaded, source = AutoModelForCausalLM.from_pretrained(model, **model_kwargs), str(model)
        self.model = loaded.requires_grad_(False)
        self.steering = nn.ModuleDict()
        """Layer, as text -> its trainable steering."""
        self._tokenizer = tokenizer
        self._source = source
        layers = decoder_layers(loaded)
        self._info = _info_of(loaded, len(layers), name or source)
        self._runner: BatchRunner | None = None
        self._is_closed = False
        for layer in target_layers:
            vector = init_scale * torch.randn(self.hidden_size)
            self.set_steering(layer, TrainableAdd(vector))
        self._hooks = StreamHooks(layers, self._trained)  # last: what fails before leaves the model as it was

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self._info

    @property
    def is_alive(self) -> bool:
        """False after `close`."""
        return not self._is_closed

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @property
    def revision(self) -> str | None:
        """Which commit of a hub's model this is; None if it is not from there."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Layers with trainable steering, ascending."""
        return tuple(sorted(map(int, self.steering)))

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **batch: Any) -> Any:
        """The model's own forward pass, loss included if `batch` has `labels`, through the trainable steering."""
        if self._is_closed:
            raise closed_error()
        return self.model(*args, **batch)

    @contextmanager
    def steered_by(self, steering: SteeringSpec | None) -> Iterator[None]:
        """Within the block, in this thread, `forward` steers every row by `steering` alone, not by what is trained.

        None steers nothing. Raises InvalidRequest for a spec that does not fit the model, Unsupported for one of
        chosen positions: a batch does not say where its prompts end.
        """
        steering = steering or SteeringSpec()
        with within("steering"):
            check_steering(steering, self._info)
            if steering.positions is not None:
                raise Unsupported("a forward pass steers all rows", reason="POSITIONS", field="positions")
        program = TorchProgram(steering, self.device)

        def change(layer: int, stream: torch.Tensor) -> torch.Tensor:
            return program.apply(layer, stream) if layer in program.layers else stream

        with self._hooks.instead(change):
            yield

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of all trainable steering: what an optimizer is given."""
        return [parameter for parameter in self.steering.parameters() if parameter.requires_grad]

    def set_steering(self, layer: int, steering: TrainableSteering) -> None:
        """Puts trainable steering behind a layer in place of what was there."""
        self._check_layer(layer)
        if steering.vector.numel() != self.hidden_size:
            raise InvalidRequest(
                f"expected {self.hidden_size} numbers, got {steering.vector.numel()}",
                reason="WRONG_WIDTH",
                field="vector",
            )
        self.steering[str(layer)] = steering.to(self.device)

    def set_steering_vector(self, layer: int, vector: Any) -> None:
        """Sets the direction of a layer's trainable steering; a layer without any gets an addition."""
        self._check_layer(layer)
        if str(layer) in self.steering:
            self._steering_of(layer).set_vector(vector)
            return
        with within("vector"):
            given = as_vector(vector)
        self.set_steering(layer, TrainableAdd(given.copy()))

    def get_steering_vector(self, layer: int) -> torch.Tensor | None:
        """A copy of the direction, float32, shape [hidden_size]; None for a layer without trainable steering."""
        self._check_layer(layer)
        return self._steering_of(layer).vector.detach().clone() if str(layer) in self.steering else None

    def to_spec(self, scale: float = 1.0) -> SteeringSpec:
        """What was trained, as a spec that every backend takes; `scale` multiplies additions.

        Raises InvalidRequest if training has made numbers that are no spec, such as bounds in the wrong order.
        """
        layers = {}
        for layer in self.target_layers:
            with within(f"layers[{layer}]"):
                operation = self._steering_of(layer).to_operation(scale)
            if operation is not None:
                layers[layer] = LayerSteeringSpec((operation,))
        return SteeringSpec(layers)

    def save_steering(self, directory: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Saves the trainable steering, and the spec that it is, to a folder; see `formats.checkpoint`.

        Raises InvalidRequest where `to_spec` does, and for an `about` that is no JSON.
        """
        saved = SavedModel(
            name=self._info.name,
            revision=self.revision,
            hidden_size=self.hidden_size,
            layer_count=self.layer_count,
        )
        trained = {layer: self._steering_of(layer) for layer in self.target_layers}
        write_checkpoint(
            directory,
            Checkpoint(
                spec=self.to_spec(),
                model=saved,
                trained={layer: Trained(kind=it.kind, parameters=it.values()) for layer, it in trained.items()},
                about=about or {},
            ),
        )

    def load_steering(self, directory: str | Path, *, any_model: bool = False) -> None:
        """Puts the trainable steering of a folder in place of all there is here: new parameters, for a new optimizer.

        Reads what `save_steering` wrote, and that of steerllm. Raises InvalidRequest, and changes nothing, where
        `formats.checkpoint.read_checkpoint` does, and for a folder that holds a spec alone.
        """
        trained = read_checkpoint(directory, model=self._info, revision=self.revision, any_model=any_model).trained
        if trained is None:
            raise InvalidRequest(
                "the folder holds a spec and no trainable steering; load_spec reads it",
                reason="NOT_TRAINED",
                field="directory",
            )
        loaded = {}
        for layer, state in trained.items():
            self._check_layer(layer)
            with within(f"trained[{layer}]"):
                loaded[layer] = restored(state.kind, state.parameters)
        self.steering.clear()
        for layer, steering in loaded.items():
            self.set_steering(layer, steering)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """The model's own, by default in the form that needs no gradients of the embeddings, which are frozen."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """The model's own."""
        self.model.gradient_checkpointing_disable()

    def _trained(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        if str(layer) not in self.steering:
            return stream
        return self.steering[str(layer)](widened(stream)).to(stream.dtype)

    def _steering_of(self, layer: int) -> TrainableSteering:
        steering = self.steering[str(layer)]
        assert isinstance(steering, TrainableSteering)
        return steering

    def _check_layer(self, layer: Any) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.layer_count:
            raise InvalidRequest(
                f"layer {layer!r} is not one of 0..{self.layer_count - 1}", reason="UNKNOWN_LAYER", field="layer"
            )

    # -- generating --------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; loaded from where the model came from unless one was given."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._source)
        return self._tokenizer

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Answers one request with events; see `core.backend.Backend.submit`. Requests that wait share a batch."""
        if self._is_closed:
            raise closed_error()
        prepared = await prepare(request, self._info, self._render)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()
        running = BatchRequest(prepared=prepared, emit=lambda event: _put(loop, events, event))
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

    async def close(self) -> None:
        """Ends what runs and removes the hooks from the model; calling it again does nothing."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """`close` for callers that are not asynchronous."""
        self._is_closed = True
        if self._runner is not None:
            self._runner.close()
        self._hooks.remove()

    async def _render(self, request: GenerateRequest) -> RenderedPrompt:
        render = partial(render_prompt, request.prompt, self.tokenizer, with_boundaries=request.capture is not None)
        return await asyncio.to_thread(render)

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
        max_programs=MANY,
        max_operations=MANY,
        max_operations_per_layer=MANY,
    )
