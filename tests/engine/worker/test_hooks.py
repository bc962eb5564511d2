"""The hook: refuses what it does not know, and never lets the kernel read what is not the stream it expects."""

import numpy as np
import pytest
import torch

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.core.specs import SteeringSpec
from steer_service.engine.slots import BankSize, ProgramLoad
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.hooks import install_hooks
from steer_service.engine.worker.hooks_cpu import CpuForward, stream_dtype
from steer_service.ops.plan import PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.program import compile_program, program_to_bytes

LAYERS = 3
WIDTH = 4
STEERED = 1
"""The layer at which the request of these tests is steered."""


class LlamaDecoderLayer(torch.nn.Module):
    """Returns what it is given, as a verified class does."""

    __module__ = "vllm.model_executor.models.llama"

    def forward(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_TD, residual_TD


class SomeOtherLayer(LlamaDecoderLayer):
    pass


class OneTensorLayer(torch.nn.Module):
    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return hidden_TD


class FirstOfTwoLayer(torch.nn.Module):
    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return hidden_TD, torch.full_like(hidden_TD, 7.0), torch.full_like(hidden_TD, 8.0)


class PPMissingLayer(torch.nn.Module):
    pass


class Model(torch.nn.Module):
    def __init__(self, *layers: torch.nn.Module, name: str = "layers") -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.add_module(name, torch.nn.ModuleList(layers))


def a_step(rows: int = 2) -> tuple[StepPlan, CpuForward]:
    """A step of one request with rows 0, 1, ..., which adds 1 to every element after layer STEERED."""
    bank = ProgramBank(BankSize(slots=1, rows=1, operations_per_layer=1), range(LAYERS), LAYERS, WIDTH)
    program = compile_program(SteeringSpec.simple_add(STEERED, np.full(WIDTH, 1.0)))
    bank.load(ProgramLoad(slot=0, digest=program.digest, data=program_to_bytes(program)))
    nowhere_L = np.zeros(LAYERS, np.int64)
    request = PlannedRequest(
        slot=0, steers_L=np.arange(LAYERS) == STEERED, before_L=nowhere_L, after_L=nowhere_L, row_limit=rows
    )
    plan = build_plan([RequestRows("a", 0, rows, 0)], [request], check_layer=LAYERS - 1)
    return plan, CpuForward(plan, bank, stream_dtype("float32"))


def run(model: Model, hidden_TD: torch.Tensor, residual_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for layer in model.model.layers:
        hidden_TD, residual_TD = layer(hidden_TD, residual_TD)
    return hidden_TD, residual_TD


def test_every_layer_of_a_verified_model_gets_a_tap() -> None:
    model = Model(*(LlamaDecoderLayer() for _ in range(LAYERS)))
    attached = install_hooks(model)
    plan, step = a_step()

    with step:
        hidden_TD, residual_TD = run(model, torch.zeros(3, WIDTH), torch.full((3, WIDTH), 2.0))

    assert attached == (0, 1, 2)
    assert plan.visited == {STEERED, LAYERS - 1}
    assert residual_TD.tolist() == [[3.0] * WIDTH, [3.0] * WIDTH, [2.0] * WIDTH]
    assert not hidden_TD.any()


def test_layers_that_a_step_does_not_want_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(*(LlamaDecoderLayer() for _ in range(LAYERS)))
    install_hooks(model)
    streams = torch.zeros(2, WIDTH), torch.zeros(2, WIDTH)
    _, step = a_step()
    called = []
    monkeypatch.setattr(step, "visit", lambda hidden_TD, residual_TD, layer: called.append(layer))
    run(model, *streams)
    assert called == []  # there is no step
    with step:
        run(model, *streams)
    assert called == [STEERED, LAYERS - 1]  # the one that is steered, and the one that is checked


def test_a_graph_has_every_hook_whatever_step_recorded_it() -> None:
    model = Model(*(LlamaDecoderLayer() for _ in range(LAYERS)))
    install_hooks(model)
    compiled = torch.compile(lambda *streams: run(model, *streams), backend="eager", fullgraph=True)
    compiled(torch.zeros(2, WIDTH), torch.zeros(2, WIDTH))  # made without a step, as vLLM does
    plan, step = a_step()
    with step, torch.compiler.set_stance("fail_on_recompile"):
        _, residual_TD = compiled(torch.zeros(2, WIDTH), torch.zeros(2, WIDTH))
    assert plan.visited == {STEERED, LAYERS - 1}
    assert residual_TD.tolist() == [[1.0] * WIDTH] * 2


@pytest.mark.parametrize("shape", [(2, WIDTH), (1, 2, WIDTH)], ids=["rows", "a batch of one"])
def test_a_layer_that_returns_one_tensor_is_steered_in_it(shape: tuple[int, ...]) -> None:
    model = Model(*(OneTensorLayer() for _ in range(LAYERS)))
    install_hooks(model, unverified="one_tensor")
    plan, step = a_step()

    with step:
        out = model.model.layers[STEERED](torch.full(shape, 2.0))

    assert plan.visited == {STEERED}
    assert out.shape == shape
    assert out.flatten().tolist() == [3.0] * 2 * WIDTH


def test_other_outputs_of_a_layer_whose_first_tensor_is_the_stream_stay_as_they_are() -> None:
    model = Model(*(FirstOfTwoLayer() for _ in range(LAYERS)))
    install_hooks(model, unverified="first_of_two")

    with a_step()[1]:
        out = model.model.layers[STEERED](torch.full((2, WIDTH), 2.0))

    assert [set(tensor.flatten().tolist()) for tensor in out] == [{3.0}, {7.0}, {8.0}]


def test_a_stream_that_is_not_contiguous_is_steered_in_a_copy_that_is() -> None:
    model = Model(*(OneTensorLayer() for _ in range(LAYERS)))
    install_hooks(model, unverified="one_tensor")

    with a_step()[1]:
        out = model.model.layers[STEERED](torch.full((WIDTH, 2), 2.0).T)

    assert out.tolist() == [[3.0] * WIDTH] * 2


@pytest.mark.parametrize(
    ("layer", "unverified"),
    [(OneTensorLayer, "hidden_and_residual"), (OneTensorLayer, "first_of_two"), (FirstOfTwoLayer, "one_tensor")],
)
def test_a_layer_that_returns_something_else_is_left_alone_and_not_taken_for_visited(
    layer: type[torch.nn.Module], unverified: str
) -> None:
    model = Model(*(layer() for _ in range(LAYERS)))
    install_hooks(model, unverified=unverified)
    plan, step = a_step()
    hidden_TD = torch.full((2, WIDTH), 2.0)

    with step:
        model.model.layers[STEERED](hidden_TD)

    assert plan.unvisited(range(LAYERS)) == [STEERED, LAYERS - 1]  # the last one is wanted for its check
    assert hidden_TD.tolist() == [[2.0] * WIDTH] * 2


def test_outside_of_a_step_a_hook_changes_nothing() -> None:
    model = Model(*(LlamaDecoderLayer() for _ in range(LAYERS)))
    install_hooks(model)
    with a_step()[1]:
        pass

    _, residual_TD = run(model, torch.zeros(2, WIDTH), torch.ones(2, WIDTH))

    assert residual_TD.tolist() == [[1.0] * WIDTH] * 2


def test_layers_of_another_stage_get_no_hook() -> None:
    model = Model(PPMissingLayer(), LlamaDecoderLayer(), PPMissingLayer())

    assert install_hooks(model) == (1,)


def test_other_models_of_the_process_are_left_alone() -> None:
    hooked, other = Model(LlamaDecoderLayer()), Model(LlamaDecoderLayer())
    install_hooks(hooked)

    assert "forward" not in vars(other.model.layers[0])


def test_a_namesake_of_a_verified_class_is_refused() -> None:
    """Transformers has a LlamaDecoderLayer too, and it returns something else."""
    namesake = type("LlamaDecoderLayer", (torch.nn.Module,), {"__module__": "transformers.models.llama"})

    with pytest.raises(Unsupported, match="has not been compared"):
        install_hooks(Model(namesake()))


def test_an_unverified_class_is_refused_with_the_way_round() -> None:
    with pytest.raises(Unsupported, match=r"SomeOtherLayer.*--steer-allow-unverified") as raised:
        install_hooks(Model(SomeOtherLayer()))

    assert raised.value.reason == "UNVERIFIED_ARCHITECTURE"
    assert install_hooks(Model(SomeOtherLayer()), unverified="hidden_and_residual") == (0,)


def test_a_model_whose_layers_are_not_found_is_refused() -> None:
    with pytest.raises(Unsupported, match="Model keeps its decoder layers in none of") as raised:
        install_hooks(Model(LlamaDecoderLayer(), name="blocks"), unverified="hidden_and_residual")

    assert raised.value.reason == "UNKNOWN_ARCHITECTURE"


def test_a_dtype_without_a_kernel_is_refused() -> None:
    with pytest.raises(Unsupported, match="float64 residual stream") as raised:
        stream_dtype("float64")

    assert raised.value.reason == "DTYPE_NOT_BUILT"


@pytest.mark.parametrize(
    ("hidden_TD", "residual_TD"),
    [
        (torch.zeros(2, WIDTH, dtype=torch.bfloat16), torch.zeros(2, WIDTH, dtype=torch.bfloat16)),
        (torch.zeros(2, WIDTH), torch.zeros(2, WIDTH, dtype=torch.float64)),
        (torch.zeros(2, WIDTH), torch.zeros(3, WIDTH)),
        (torch.zeros(2, WIDTH + 1), torch.zeros(2, WIDTH + 1)),
        (torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)),
        (torch.zeros(WIDTH, 2).T, torch.zeros(2, WIDTH)),
        (torch.zeros(2, WIDTH, dtype=torch.float64), None),
    ],
    ids=["dtype", "residual dtype", "two shapes", "width", "too few rows", "not contiguous", "one tensor"],
)
def test_a_stream_that_the_kernel_would_misread_stops_the_step(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None
) -> None:
    plan, step = a_step(rows=2)

    with pytest.raises(EngineFailed, match="a layer returned torch") as raised:
        step.visit(hidden_TD, residual_TD, STEERED)

    assert raised.value.reason == "WRONG_STREAM"
    assert plan.visited == set()


def test_a_layer_that_the_plan_does_not_want_is_not_looked_at() -> None:
    plan, step = a_step()

    step.visit(torch.zeros(2, WIDTH, dtype=torch.float64), None, STEERED - 1)

    assert plan.visited == set()


def test_at_the_last_layer_every_row_of_a_steered_request_is_checked() -> None:
    """A vector that is finite can make the model itself calculate NaN, in layers where nothing is steered."""
    plan, step = a_step(rows=2)
    broken_TD = torch.tensor([[1.0] * WIDTH, [1.0, torch.nan, 1.0, 1.0]])
    hidden_TD = broken_TD.clone()

    step.visit(hidden_TD, None, LAYERS - 1)

    assert plan.bad_N.tolist() == [0, 1]
    torch.testing.assert_close(hidden_TD, broken_TD, rtol=0, atol=0, equal_nan=True)


def test_padding_rows_are_left_alone() -> None:
    _, step = a_step(rows=1)
    hidden_TD = torch.ones(4, WIDTH)

    step.visit(hidden_TD, None, STEERED)

    assert hidden_TD.tolist() == [[2.0] * WIDTH] + [[1.0] * WIDTH] * 3
