"""What the engine relies on in vLLM, one test per seam: each fails with a plain sentence if its seam moves.

The first test asks the source of the vLLM that is installed (tests/engine/seams, which check_vllm_version.py puts to
other versions); the others try what can only be tried.
"""

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.config.scheduler import SchedulerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.engine.config import SteeringConfig
from steer_service.engine.refusals import REFUSALS, WORKER_CLS
from steer_service.engine.vllm_patches.compat import OVERLOADED, REFUSED
from steer_service.engine.worker import hooks as hook
from tests.engine import check_vllm_version
from tests.engine.seams import SEAMS, Moved, Seam, Source, require_order
from tests.tiny_models import LAYERS, ModelFolder

ROOT = Path(__file__).parents[2]
SOURCE = Source(Path(vllm.__file__).parent)


def says(seam: str, verified: object = "0.32.0") -> str:
    return f"{seam}: not as in vLLM {verified}; this is vLLM {vllm.__version__}"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_the_installed_vllm_has_the_seam(seam: Seam) -> None:
    try:
        seam.check(SOURCE)
    except Moved as moved:
        pytest.fail(f"{says(seam.name, ', '.join(seam.verified))}: {moved}. {seam.used_by} relies on it", pytrace=False)


def test_every_seam_was_verified_at_both_ends_of_the_range() -> None:
    assert [seam.name for seam in SEAMS if not {"0.24.0", "0.33.0"} <= set(seam.verified)] == []


def test_a_moved_seam_is_reported_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "arg_utils.py").write_text("class EngineArgs:\n    model: str\n")
    source = Source(tmp_path)
    said = {}
    for seam in SEAMS:
        with pytest.raises(Moved) as moved:
            seam.check(source)
        said[seam.name] = str(moved.value)

    assert said["EngineArgs.worker_cls, additional_config"] == "EngineArgs has no additional_config, worker_cls"
    assert said["_dummy_run"] == "there is no file v1/worker/gpu_model_runner.py"


def test_a_changed_order_is_reported() -> None:
    require_order("a(); b()", "f", "a(", "b(")
    with pytest.raises(Moved, match=r"f no longer has b\( then a\(: a\( is not there or comes earlier"):
        require_order("a(); b()", "f", "b(", "a(")


def test_an_unpacked_wheel_can_be_checked(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.argv", ["check_vllm_version", str(SOURCE.folder.parent)])

    status = check_vllm_version.main()

    out = capsys.readouterr().out
    assert status == 0, out
    assert f"vLLM {SOURCE.version} (" in out
    assert out.count("  ok ") == len(SEAMS)


def test_our_worker_class_can_be_found_by_its_name() -> None:
    module, name = WORKER_CLS.rsplit(".", 1)
    assert name in vars(__import__(module, fromlist=[name])), f"{WORKER_CLS} does not exist"


def test_every_refused_argument_exists() -> None:
    missing = set(REFUSALS) - set(inspect.signature(AsyncEngineArgs).parameters)
    assert not missing, says(f"engine arguments {sorted(missing)}")


def test_a_request_carries_arguments_of_ours_and_may_refuse_cached_blocks() -> None:
    params = SamplingParams(extra_args={"steer": {"layers": [1], "digest": "d"}}, skip_reading_prefix_cache=True)
    assert params.extra_args == {"steer": {"layers": [1], "digest": "d"}}, says("SamplingParams.extra_args")
    assert params.skip_reading_prefix_cache is True, says("SamplingParams.skip_reading_prefix_cache")


def test_a_prompt_carries_a_salt() -> None:
    assert "cache_salt" in TokensPrompt.__optional_keys__, says("TokensPrompt.cache_salt")


def test_of_our_configuration_only_what_changes_the_graph_is_in_the_compile_caches_key(tmp_path: Path) -> None:
    others = SteeringConfig(slots=4, bank_bytes=1 << 20, shm_dir=str(tmp_path), trace="x", constraint_seconds=2)
    plain, ours, same, unverified = (
        VllmConfig(additional_config=config).compute_hash()
        for config in (
            {},
            SteeringConfig().to_additional_config(),
            others.to_additional_config(),
            SteeringConfig(allow_unverified=True).to_additional_config(),
        )
    )
    assert len({plain, ours, unverified}) == 3, says("VllmConfig.compute_hash with additional_config")
    assert same == ours


def test_our_configuration_travels_with_vllms() -> None:
    ours = SteeringConfig(slots=4)
    vllm_config = VllmConfig(additional_config={"theirs": 1, **ours.to_additional_config()})
    for travelled in (pickle.loads(pickle.dumps(vllm_config)), copy.deepcopy(vllm_config)):
        assert isinstance(travelled.additional_config, dict)  # else vLLM ignores the user's part
        assert travelled.additional_config["theirs"] == 1
        assert SteeringConfig.from_vllm(travelled) == ours, says("VllmConfig.additional_config")


def scheduler_of_ours() -> str:
    """Stands for a callable that is named as a scheduler class."""
    return "ours"


def test_a_scheduler_is_found_by_its_name_and_need_not_be_a_class() -> None:
    name = f"{__name__}.{scheduler_of_ours.__name__}"
    config = SimpleNamespace(scheduler_cls=name, async_scheduling=True)
    assert SchedulerConfig.get_scheduler_cls(config) is scheduler_of_ours, says("SchedulerConfig.scheduler_cls")


def test_the_hook_is_an_op_that_changes_its_arguments_and_that_compilation_leaves_alone() -> None:
    assert hook._library is not None
    schema = torch.ops.steerllm.hook.default._schema
    assert [argument.name for argument in schema.arguments] == ["hidden", "residual", "layer"]
    assert [argument.is_write for argument in schema.arguments] == [True, True, False], says("torch.library")
    hidden = torch.zeros(2, 4, device="meta")
    assert hook.visit_in_graph(hidden, None, 0) is None, says("the op's meta implementation")


def test_a_request_that_vllm_refuses_is_distinguished_from_one_that_failed() -> None:
    assert issubclass(VLLMValidationError, REFUSED), says("vllm.exceptions.VLLMValidationError")
    assert not issubclass(EngineDeadError, (*REFUSED, *OVERLOADED)), says("vllm.v1.engine.exceptions.EngineDeadError")


@pytest.fixture(scope="module")
def live(model_folder: ModelFolder) -> dict[str, Any]:
    """What tests/engine/live_seams.py measured."""
    command = [sys.executable, "-m", "tests.engine.live_seams", str(model_folder("llama"))]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    found = re.search(r"^FACTS (.*)$", answer.stdout, re.M)
    assert found, answer.stdout[-2000:] + answer.stderr[-4000:]
    return json.loads(found[1])


@pytest.mark.engine
def test_the_runner_prepares_inputs_once_a_step_and_not_in_dummy_steps(live: dict[str, Any]) -> None:
    assert live["heard_of_dummy"] == [], says("GPUModelRunner._dummy_run")
    assert live["heard"][:2] == [64, 6], says("GPUModelRunner._prepare_inputs")  # a prompt of 70 in steps of 64


@pytest.mark.engine
def test_a_prefix_is_looked_up_with_a_limit_that_can_be_lowered(live: dict[str, Any]) -> None:
    assert live["hits"] == [[69, 0], [69, 64], [69, 0]], says("coordinator.find_longest_cache_hit, cache_salt")


@pytest.mark.engine
def test_a_layers_cache_has_one_entry_per_block_in_dimension_0(live: dict[str, Any]) -> None:
    assert live["layers"] == LAYERS
    for shape in live["shapes"]:
        assert shape[0] % live["num_blocks"] == 0, says("static_forward_context[layer].kv_cache")
    assert len(live["held"]) >= 5  # two different prompts of 70 tokens in blocks of 32
    assert live["written"] == [live["held"]] * LAYERS, says("runner.requests[...].block_ids")


@pytest.mark.engine
def test_zeroing_blocks_leaves_nothing_in_them(live: dict[str, Any]) -> None:
    if vllm.__version__.startswith("0.24."):
        pytest.skip("the CPU runner's _zero_block_ids does nothing in 0.24")
    assert live["left_after_zeroing"] == [0.0] * LAYERS, says("CPUModelRunner._zero_block_ids")
