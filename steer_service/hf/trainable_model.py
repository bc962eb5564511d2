"""A transformers model with frozen weights and trainable steering after chosen layers: an `nn.Module`."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer_service.core.arrays import VectorLike, as_vector
from steer_service.core.backend import ModelInfo
from steer_service.core.checks import check_steering
from steer_service.core.errors import InvalidRequest, Unsupported, closed_error, within
from steer_service.core.field_checks import check_layer
from steer_service.core.specs import LayerSteeringSpec, SteeringSpec
from steer_service.formats.checkpoint import Checkpoint, SavedModel, Trained, read_checkpoint, write_checkpoint
from steer_service.hf.layers import ResidualHooks, decoder_layers, widened
from steer_service.hf.programs import TorchProgram
from steer_service.hf.trainable import TrainableAdd, TrainableSteering, restored


class TrainableModel(nn.Module):
    """A causal LM of transformers with frozen weights and steering that can be trained.

    `model(**batch)` is the model's own forward pass, with its loss, through the trainable steering of `target_layers`.
    Layer L is the residual stream after decoder layer L, counted from 0.
    """

    def __init__(
        self, model: nn.Module, info: ModelInfo, *, target_layers: Iterable[int] = (), init_scale: float = 0.0
    ) -> None:
        """Freezes `model` and puts hooks after its decoder layers.

        Every target layer gets an addition. Its vector is zero or, with `init_scale`, normally distributed noise of
        that size per element. Raises InvalidRequest for a layer that the model does not have, Unsupported for a model
        whose decoder layers are not found.
        """
        super().__init__()
        self.model = model.requires_grad_(False)
        self.steering = nn.ModuleDict()
        """Layer, as text -> its trainable steering."""
        self._info = info
        self._is_closed = False
        layers = decoder_layers(model)
        for layer in target_layers:
            vector = init_scale * torch.randn(info.hidden_size)
            self.set_steering(layer, TrainableAdd(vector))
        self._hooks = ResidualHooks(layers, self._apply_trained)  # last: an error above leaves the model as it was

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self._info

    @property
    def is_alive(self) -> bool:
        """False after `close_sync`."""
        return not self._is_closed

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.model.parameters()).device

    @property
    def revision(self) -> str | None:
        """The commit of a model from the hub; None for any other model."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Layers with trainable steering, ascending."""
        return tuple(sorted(map(int, self.steering)))

    def forward(self, *args: Any, **batch: Any) -> Any:
        """The model's own forward pass through the trainable steering; returns what the model returns.

        The output has a loss if `batch` has `labels`. Raises EngineFailed after `close_sync`.
        """
        if self._is_closed:
            raise closed_error("the model")
        return self.model(*args, **batch)

    @contextmanager
    def steered_by(self, steering: SteeringSpec | None) -> Iterator[None]:
        """Within the block, in this thread, `forward` steers every row by `steering` alone, not by what is trained.

        None steers nothing. Raises InvalidRequest for a spec that does not fit the model. Raises Unsupported for a
        spec with `positions`: a batch does not say where its prompts end.
        """
        steering = steering or SteeringSpec()
        with within("steering"):
            check_steering(steering, self._info)
            for path, scope in {"positions": steering.positions, **steering.numbered_scopes().paths}.items():
                if scope is not None:
                    raise Unsupported("a forward pass steers all rows", reason="POSITIONS", field=path)
        program = TorchProgram(steering, self.device)

        def change(layer: int, stream: torch.Tensor) -> torch.Tensor:
            return program.apply(layer, stream) if layer in program.layers else stream

        with self._hooks.instead(change):
            yield

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The float32 parameters of all trainable steering, for an optimizer."""
        return [parameter for parameter in self.steering.parameters() if parameter.requires_grad]

    def set_steering(self, layer: int, steering: TrainableSteering) -> None:
        """Puts trainable steering after a layer and replaces what was there.

        Raises InvalidRequest for a layer that the model does not have, and for a vector of another hidden size.
        """
        self._check_layer(layer)
        if steering.vector.numel() != self._info.hidden_size:
            raise InvalidRequest(
                f"expected {self._info.hidden_size} numbers, got {steering.vector.numel()}",
                reason="WRONG_WIDTH",
                field="vector",
            )
        self.steering[str(layer)] = steering.to(self.device)

    def set_steering_vector(self, layer: int, vector: VectorLike) -> None:
        """Sets the direction of a layer's trainable steering; a layer without any gets an addition.

        `vector` has shape [hidden_size]. Raises InvalidRequest where `set_steering` does, and for numbers that are not
        finite.
        """
        self._check_layer(layer)
        if str(layer) in self.steering:
            self._steering_of(layer).set_vector(vector)
            return
        with within("vector"):
            given = as_vector(vector)
        self.set_steering(layer, TrainableAdd(given.copy()))

    def get_steering_vector(self, layer: int) -> torch.Tensor | None:
        """A copy of the direction, float32, shape [hidden_size]; None for a layer without trainable steering.

        Raises InvalidRequest for a layer that the model does not have.
        """
        self._check_layer(layer)
        return self._steering_of(layer).vector.detach().clone() if str(layer) in self.steering else None

    def to_spec(self, scale: float = 1.0) -> SteeringSpec:
        """The trained steering as a spec for any backend; `scale` multiplies additions.

        Raises InvalidRequest if training has made numbers that no spec can have, such as bounds in the wrong order.
        """
        layers = {}
        for layer in self.target_layers:
            with within(f"layers[{layer}]"):
                operation = self._steering_of(layer).to_operation(scale)
            if operation is not None:
                layers[layer] = LayerSteeringSpec((operation,))
        return SteeringSpec(layers)

    def save_steering(self, directory: str | Path, *, about: Mapping[str, object] | None = None) -> None:
        """Saves the trainable steering and its spec to a folder, which `load_spec` reads too.

        `about` is kept with them, as JSON. Raises InvalidRequest where `to_spec` does, and for an `about` that is not
        JSON.
        """
        saved = SavedModel(
            name=self._info.name,
            revision=self.revision,
            hidden_size=self._info.hidden_size,
            layer_count=self._info.layer_count,
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
        """Replaces all trainable steering by that of a folder: the parameters are new and need a new optimizer.

        Reads the files of `save_steering` and of the in-process steerllm. `any_model` accepts files of another model.
        Raises InvalidRequest for files that are damaged or of another model, and for a folder that holds only a spec.
        An error changes nothing.
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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, object] | None = None) -> None:
        """Calls the model's method of this name.

        The default is the non-reentrant form, which needs no gradients of the embeddings: these are frozen.
        """
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Calls the model's method of this name."""
        self.model.gradient_checkpointing_disable()

    def close_sync(self) -> None:
        """Removes the hooks from the model; `forward` fails afterwards. Calling it again does nothing."""
        self._is_closed = True
        self._hooks.remove()

    def _apply_trained(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        if str(layer) not in self.steering:
            return stream
        return self.steering[str(layer)](widened(stream)).to(stream.dtype)

    def _steering_of(self, layer: int) -> TrainableSteering:
        steering = self.steering[str(layer)]
        assert isinstance(steering, TrainableSteering)
        return steering

    def _check_layer(self, layer: Any) -> None:
        with within("layer"):
            check_layer(layer, self._info.layer_count - 1)
