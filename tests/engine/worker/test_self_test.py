"""The self-test at start: lets a model through whose hooks read and write its stream, and no other."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.models.mixtral import MixtralMoE

from steer_service.core.errors import Unsupported
from steer_service.engine.slots import BankSize
from steer_service.engine.worker import dummy_run as dummy
from steer_service.engine.worker import model_proof, rank_agreement
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.hooks import HookContext, install_hooks
from steer_service.engine.worker.hooks_cpu import CpuHooks
from steer_service.engine.worker.layer_outputs import LAYER_OUTPUTS, LayerOutput
from steer_service.engine.worker.model_proof import HookedModel
from steer_service.engine.worker.self_test import run_self_test
from tests.engine.dummy_rows import watch_padding
from tests.engine.families import make_family
from tests.engine.in_process import in_process

LAYERS = 9
WIDTH = 16
VOCABULARY = 40


class Block(torch.nn.Module):
    """A decoder layer without attention; its subclasses differ in how they hand on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def change(self, stream_TD: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.nn.functional.layer_norm(stream_TD, (WIDTH,)) @ self.weight)


class SumBlock(Block):
    """Hands on a change and the stream before it."""

    def forward(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        stream_TD = hidden_TD if residual_TD is None else hidden_TD + residual_TD
        return self.change(stream_TD), stream_TD


class OneBlock(Block):
    """Hands on the stream."""

    def forward(self, hidden_TD: torch.Tensor, _: None) -> torch.Tensor:
        return hidden_TD + self.change(hidden_TD)


class FirstBlock(Block):
    """Hands on the stream, and the one before, which nobody reads."""

    def forward(self, hidden_TD: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_TD + self.change(hidden_TD), hidden_TD


class TwiceBlock(Block):
    """Hands on the stream twice, and reads both: steering the first alone is not enough, reading it is."""

    def forward(self, hidden_TD: torch.Tensor, other_TD: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        stream_TD = hidden_TD + self.change(hidden_TD if other_TD is None else other_TD)
        return stream_TD, stream_TD.clone()


class Model(torch.nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings_VD = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(block() for _ in range(LAYERS))
        self.model.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self.model.norm(run_layers(self, ids_T))


def run_layers(model: Model, ids_T: torch.Tensor) -> torch.Tensor:
    """What the final norm takes."""
    hidden_TD, other_TD = model.embeddings_VD[ids_T].clone(), None
    for layer in model.model.layers:
        output = layer(hidden_TD, other_TD)
        hidden_TD, other_TD = output if isinstance(output, tuple) else (output, None)
    return hidden_TD + other_TD if isinstance(model.model.layers[0], SumBlock) else hidden_TD


class Runner:
    """As much of vLLM's model runner as the self-test knows."""

    def __init__(self, model: Model, rows_at_once: int) -> None:
        self.model = model
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
        self.scheduler_config = SimpleNamespace(max_num_seqs=rows_at_once)
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace())
        self.max_num_tokens = 64
        self.input_ids = SimpleNamespace(gpu=torch.full((64,), 3, dtype=torch.int32))

    def get_model(self) -> Model:
        return self.model

    def _dummy_run(self, count: int, **_: Any) -> tuple[torch.Tensor, None]:
        padded = self.model(self.input_ids.gpu[: count + 2].long())
        return padded, None


@pytest.fixture(autouse=True)
def _one_stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("engine") is None:
        alone = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1)
        for module in (dummy, model_proof, rank_agreement):
            monkeypatch.setattr(module, "get_pp_group", lambda: alone)
        monkeypatch.setattr(rank_agreement, "get_tp_group", lambda: alone)


def hooked(
    block: type[Block], layer_output: LayerOutput, *, rows_at_once: int = 32, dtype: str = "float32"
) -> HookedModel:
    model = Model(block).to(getattr(torch, dtype))
    layers = install_hooks(model, unverified=layer_output)
    bank = ProgramBank(BankSize(slots=LAYERS, rows=LAYERS, operations_per_layer=1), layers, LAYERS, WIDTH)
    context = HookContext(
        bank=bank,
        layers=layers,
        layer_count=LAYERS,
        stage_layers=LAYERS,
        hidden_size=WIDTH,
        dtype=dtype,
        device=torch.device("cpu"),
        rows=rows_at_once,
        requests=rows_at_once,
        recorded_rows=0,
    )
    return HookedModel(
        runner=Runner(model, rows_at_once), layer_output=layer_output, context=context, hooks=CpuHooks(context)
    )


TRUTHS = [
    (SumBlock, LayerOutput.HIDDEN_AND_RESIDUAL),
    (OneBlock, LayerOutput.ONE_TENSOR),
    (FirstBlock, LayerOutput.FIRST_OF_TWO),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows_at_once", [32, 3, 1])
@pytest.mark.parametrize(("block", "layer_output"), TRUTHS)
def test_the_right_convention_passes_and_inputs_are_restored(
    block: type[Block], layer_output: LayerOutput, rows_at_once: int, dtype: str
) -> None:
    model = hooked(block, layer_output, rows_at_once=rows_at_once, dtype=dtype)

    run_self_test(model)

    assert model.runner.input_ids.gpu.tolist() == [3] * 64


LIES = [
    (block, layer_output)
    for block in (SumBlock, OneBlock, FirstBlock)
    for layer_output in LayerOutput
    if (block, layer_output) not in TRUTHS
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block", "layer_output"), LIES)
def test_every_wrong_convention_fails(block: type[Block], layer_output: LayerOutput, dtype: str) -> None:
    with pytest.raises(Unsupported, match="do not read and write this model's residual stream") as raised:
        run_self_test(hooked(block, layer_output, dtype=dtype))

    assert raised.value.reason == "TAP_SELF_TEST_FAILED"


def test_a_stream_that_is_read_rightly_but_not_written_fails() -> None:
    with pytest.raises(Unsupported, match="replaced by another's after layer") as raised:
        run_self_test(hooked(TwiceBlock, LayerOutput.FIRST_OF_TWO))

    assert raised.value.reason == "TAP_SELF_TEST_FAILED"


def test_a_stream_that_is_written_rightly_but_is_not_what_the_final_norm_takes_fails() -> None:
    model = hooked(OneBlock, LayerOutput.ONE_TENSOR)
    inner = model.runner.model.model
    inner.norm.register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1),))
    inner.norm_of_another_name, inner.norm = inner.norm, torch.nn.LayerNorm(WIDTH)
    model.runner.model.forward = lambda ids_T: inner.norm_of_another_name(run_layers(model.runner.model, ids_T))

    with pytest.raises(Unsupported, match="the final norm of the residual stream"):
        run_self_test(model)


def test_a_model_that_scales_its_output_passes() -> None:
    model = hooked(OneBlock, LayerOutput.ONE_TENSOR)
    forward = model.runner.model.forward
    model.runner.model.forward = lambda ids_T: forward(ids_T) / 16

    run_self_test(model)


def test_a_model_that_puts_out_the_same_for_every_input_cannot_be_tested() -> None:
    model = hooked(OneBlock, LayerOutput.ONE_TENSOR)
    torch.nn.init.ones_(model.runner.model.embeddings_VD)

    with pytest.raises(Unsupported, match="the same for every input"):
        run_self_test(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")

    def make(name: str) -> Any:
        if not (root / name).exists():
            make_family(name, root / name)
        return root / name

    return make


@pytest.mark.engine
def test_the_experts_of_a_mixture_compute_the_rows_of_the_self_test(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_padding(monkeypatch, MixtralMoE)
    with in_process(folder("mixtral")) as engine:
        assert engine.report.refusal == ""

    assert {count for count, _ in seen} == {1, dummy.INPUTS + model_proof.MOVED}
    assert all(padding == [row >= count for row in range(len(padding))] for count, padding in seen)


@pytest.mark.engine
def test_the_self_test_leaves_no_trace_in_the_engine(folder: Any) -> None:
    with in_process(folder("llama")) as engine:
        worker = engine.worker
        assert engine.report.refusal == ""
        assert all(not cache.any() for cache in worker.model_runner.kv_caches)
        assert not worker.model_runner.input_ids.gpu.any()
        assert not worker.steering.bank.op_counts_LS.any()
        assert not worker.steering.bank.directions_WD.any()
        assert worker.steering._forward is None
        assert not np.any(engine._failure_counters.counts_RS)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("family", "layer", "lie"),
    [
        pytest.param(family, layer, lie, marks=() if number == 0 else pytest.mark.extended)
        for family, layer, truth in [
            ("llama", "llama.LlamaDecoderLayer", LayerOutput.HIDDEN_AND_RESIDUAL),
            ("gpt2", "gpt2.GPT2Block", LayerOutput.ONE_TENSOR),
            ("cohere", "commandr.CohereDecoderLayer", LayerOutput.FIRST_OF_TWO),
        ]
        for number, lie in enumerate(sorted(set(LayerOutput) - {truth}))
    ],
)
def test_a_wrong_entry_in_the_table_of_layer_outputs_is_refused(
    family: str, layer: str, lie: LayerOutput, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYER_OUTPUTS, f"vllm.model_executor.models.{layer}", lie)

    with in_process(folder(family)) as engine:
        assert engine.report.refusal_reason == "TAP_SELF_TEST_FAILED"
        assert "residual stream" in engine.report.refusal
