"""Real vLLM on a CPU whose steps replay recorded graphs, with the hooks of a GPU. Run by test_recorded_graphs.py."""

from collections.abc import Iterator
from dataclasses import replace
from gc import collect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CaptureSite
from steer_service.core.errors import Unsupported
from steer_service.engine.worker import self_test
from steer_service.engine.worker import worker as worker_module
from steer_service.engine.worker.batch_rows import is_v2
from steer_service.engine.worker.kernel_proof import KernelProof
from steer_service.engine.worker.model_proof import HookedModel
from steer_service.engine.worker.self_test import run_self_test
from steer_service.engine.worker.worker import PlatformWorker, SteeringWorker
from steer_service.ops.cuda_tables import HEADER, BankTables, StepTables
from steer_service.ops.plan import HostBank, StepPlan
from tests.engine.cuda_engine import TOLERANCE, asks
from tests.engine.in_process import Ask, InProcess, in_process
from tests.engine.oracle import Oracle, relative_error
from tests.engine.recorder import SIZES, Graph, RecordedHooks, record_graphs, stand_in_for_cuda_graphs
from tests.tiny_models import LAYERS, ModelFolder

WORKER = "tests.engine.recorded_engine.RecordedWorker"


class RecordedWorker(SteeringWorker):
    """The worker, with the hooks of a GPU, whose launches are recorded."""

    make_hooks = RecordedHooks

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads a model for which so many rows will be recorded."""
        self.vllm_config.compilation_config.cudagraph_capture_sizes = SIZES
        super().load_model(*args, **kwargs)


@pytest.fixture(scope="module")
def folder(model_folder: ModelFolder) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[InProcess]:
    """An engine whose graphs are recorded before its self-test, as on a GPU."""
    warm_up = PlatformWorker.compile_or_warm_up_model

    def recorded(worker: Any) -> Any:
        times = warm_up(worker)
        record_graphs(worker.model_runner)
        return times

    gpu = SimpleNamespace(device_type="cuda", is_cpu=lambda: False)
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_cuda_graphs(patch)
        patch.setattr(worker_module, "current_platform", gpu)  # no flag allows it
        patch.setattr(PlatformWorker, "compile_or_warm_up_model", recorded)
        with in_process(folder, worker_cls=WORKER) as engine:
            yield engine


@pytest.fixture
def model(engine: InProcess) -> HookedModel:
    return engine.worker.steering.hooked_model


def graphs_of(engine: InProcess) -> dict[str, list[Graph]]:
    """The recorded graphs of each mode."""
    runner = engine.worker.model_runner
    piecewise = runner.get_model().model.forward.concrete_cudagraph_entries
    if is_v2(runner):
        full = list(runner.cudagraph_manager.graphs.values())
    else:
        full = [entry.cudagraph for entry in runner.model.concrete_cudagraph_entries.values()]
    return {"FULL": full, "PIECEWISE": [entry.cudagraph for entry in piecewise.values()]}


def empty_caches(engine: InProcess) -> None:
    """Forgets all requests and their keys and values: a proof, as the next test makes one, has these empty."""
    engine.worker.steering.requests._tracked.clear()  # as the next step would do, which unmaps their regions
    collect()
    for cache in engine.worker.model_runner.kv_caches:
        cache.zero_()


def replays_of(engine: InProcess) -> dict[str, int]:
    return {mode: sum(graph.replays for graph in found) for mode, found in graphs_of(engine).items()}


def test_the_proof_at_start_has_replayed_graphs_of_every_class(engine: InProcess) -> None:
    assert engine.report.refusal == ""
    assert engine.report.proof is not None
    assert set(engine.report.proof.step_classes) == {
        "without graphs of 17 rows",
        "piecewise graphs of 16 rows",
        "piecewise graphs of 1 rows",
        "piecewise graphs of 4 rows",
        "full graph of 1 rows",
        "full graph of 4 rows",
        "full graph of 8 rows",
    }
    assert engine.report.proof.is_exact
    assert all(count > 0 for count in replays_of(engine).values())


def test_requests_replay_graphs_under_other_plans_and_their_rows_equal_the_oracle(
    engine: InProcess, folder: Path
) -> None:
    short = [Ask(range(2000, 2007), 3, asks()[2].steering), Ask(range(3000, 3004), 3)]  # both in one small first step
    before = replays_of(engine)
    answers = [*engine.run(asks()), *engine.run(short)]
    empty_caches(engine)
    assert all(count > before[mode] for mode, count in replays_of(engine).items())
    oracle = Oracle(folder)
    for ask, answer in zip([*asks(), *short], answers, strict=True):
        want = oracle.streams(answer.token_ids[:-1], ask.steering)
        for layer in range(LAYERS):
            assert relative_error(answer.streams[layer], want[layer]) <= TOLERANCE["float32"]


def test_a_step_that_captures_more_than_there_is_room_for_runs_without_graphs(engine: InProcess, folder: Path) -> None:
    steering = engine.worker.steering
    both = (CaptureSite.BEFORE, CaptureSite.AFTER)
    oracle = Oracle(folder)
    modes = []
    for sites in (both[1:], both):  # a prompt of 13 rows has a graph of 16, with room for 16 rows of one site
        ask = Ask(range(2000, 2013), 3, asks()[2].steering, sites)
        plain = replace(ask, steering=None)
        for one in (ask, plain):
            before = replays_of(engine)
            (answer,) = engine.run([one])
            modes.append({mode for mode, count in replays_of(engine).items() if count > before[mode]})
            want = oracle.streams(answer.token_ids[:-1], one.steering)
            for layer in range(LAYERS):
                assert relative_error(answer.streams[layer], want[layer]) <= TOLERANCE["float32"]
                if one is plain and sites == both:
                    assert np.array_equal(answer.streams_before[layer], answer.streams[layer])
    assert modes == [{"FULL", "PIECEWISE"}] * 2 + [{"FULL"}] * 2
    assert len(steering.hooks.tables.staging) == steering.hooks.graph_bytes
    empty_caches(engine)


def test_steps_without_graphs_are_proven_where_every_step_has_a_graph(
    model: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.runner, "max_num_tokens", SIZES[-1])

    assert "without graphs of 10 rows" in run_self_test(model).step_classes


def check_refused(model: HookedModel, finding: str) -> None:
    """The proof finds a fault, and a second one, without it, passes: nothing was left behind."""
    with pytest.raises(Unsupported, match=finding) as raised:
        run_self_test(model)
    assert raised.value.reason == "TAP_SELF_TEST_FAILED"
    assert not model.context.bank.op_counts_LS.any()


@pytest.mark.parametrize(("mode", "words"), [("FULL", "full graph of 4 rows"), ("PIECEWISE", "piecewise graphs of 16")])
def test_a_layer_that_one_graph_lacks_is_found(engine: InProcess, model: HookedModel, mode: str, words: str) -> None:
    rows = {"FULL": 4, "PIECEWISE": 16}[mode]
    graph = next(graph for graph in graphs_of(engine)[mode] if graph.rows == rows)
    place = graph.launches[2]
    launch, graph.steps[place] = graph.steps[place], lambda: None
    try:
        check_refused(model, rf"{words}.*: the hooks of layers \[2\] did not run\. Steps of this kind would be")
    finally:
        graph.steps[place] = launch


def test_tables_that_are_not_cleared_are_found(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTables, "clear", lambda _: None)

    check_refused(model, "a pass without a plan, after others, changes the output, by .* Try --enforce-eager")


def test_a_slot_that_keeps_its_old_program_is_found(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    update, seen = BankTables.update, set[int]()

    def once(tables: BankTables, host: HostBank, slot: int) -> None:
        if host.op_counts_LS[:, slot].sum() == 0 or slot not in seen:
            update(tables, host, slot)
        seen.add(slot)
        if host.op_counts_LS[:, slot].sum() == 0:
            seen.discard(slot)

    monkeypatch.setattr(BankTables, "update", once)
    check_refused(model, "a row that is not steered there differs|residual stream was captured after layer")


@pytest.mark.parametrize("skipped", ["kernel", "model"])
def test_rows_that_are_swapped_are_found(model: HookedModel, monkeypatch: pytest.MonkeyPatch, skipped: str) -> None:
    """In the kernel's proof or, behind it, in that of the model."""
    fill = StepTables.fill

    def swapped(tables: StepTables, plan: StepPlan, **options: Any) -> Any:
        staged = fill(tables, plan, **options)
        if skipped == "model" or plan.rows[0].row_count > 1:  # as in the kernel's proof only
            rows_TC = tables.header[HEADER : HEADER + 3 * int(tables.header[0])].view(-1, 3)
            rows_TC.copy_(rows_TC.roll(1, 0))
        return staged

    monkeypatch.setattr(StepTables, "fill", swapped)
    if skipped == "model":
        monkeypatch.setattr(self_test, "prove_kernel", lambda *_: KernelProof(rows=0, worst=0.0))
    check_refused(model, "the residual stream|a row" if skipped == "model" else "the kernel on cpu, after layer 0.*: ")


def test_graphs_that_no_dummy_run_replays_are_found(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "modes_to_observe", lambda _: {"FULL", "PIECEWISE", "OTHER"})

    check_refused(model, "no test has replayed OTHER")


def test_the_proof_passes_again_when_the_faults_are_gone(engine: InProcess, model: HookedModel) -> None:
    assert run_self_test(model).step_classes == engine.report.proof.step_classes
