"""Engine arguments: vLLM's under their own names, ours beside them, and a reason for each that is refused."""

import argparse
import re
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import AsyncEngineArgs

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.engine import steering_config
from steer_service.engine.config import (
    WORKER_CLS,
    SteeringConfig,
    add_engine_arguments,
    engine_args_for,
    engine_arguments_from,
    flag_of,
)
from steer_service.engine.refusals import REFUSALS, check_finished_config
from steer_service.engine.slots import BankSize
from steer_service.engine.worker.layer_outputs import LayerOutput

MODEL = "some/model"
DEFAULTS = {
    field.name: getattr(AsyncEngineArgs(model=MODEL), field.name)
    for field in fields(AsyncEngineArgs)
    if field.name != "model"
}
"""Every argument of vLLM but the model, at its default."""


def parsed(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return parser.parse_args(line)


CHANGED = {"worker_cls", "scheduler_cls", "additional_config", "structured_outputs_config"}
"""Arguments of vLLM in which this project has a say."""


def test_vllms_arguments_pass_unchanged() -> None:
    args = engine_args_for(MODEL, {"max_model_len": 512, "dtype": "float32", "enforce_eager": True})

    assert (args.model, args.max_model_len, args.dtype, args.enforce_eager) == (MODEL, 512, "float32", True)


def test_every_argument_of_vllm_is_taken_at_its_default() -> None:
    args = engine_args_for(MODEL, dict(DEFAULTS))

    for name, value in DEFAULTS.items():
        if name not in CHANGED:
            assert getattr(args, name) == value


def test_each_argument_of_vllm_is_taken_alone_at_its_default() -> None:
    for name, value in DEFAULTS.items():
        engine_args_for(MODEL, {name: value})


def test_the_worker_is_always_ours() -> None:
    assert engine_args_for(MODEL, {}).worker_cls == WORKER_CLS
    assert engine_args_for(MODEL, {"worker_cls": "auto"}).worker_cls == WORKER_CLS


def test_additional_configuration_of_others_is_kept_beside_ours() -> None:
    args = engine_args_for(MODEL, {"additional_config": {"theirs": 1}, "steer_slots": 5})

    assert args.additional_config["theirs"] == 1
    assert SteeringConfig.from_vllm(args).slots == 5


def test_the_arguments_given_are_not_changed() -> None:
    given_ = {"additional_config": {"theirs": 1}, "steer_slots": 5, "seed": 1}

    engine_args_for(MODEL, given_)

    assert given_ == {"additional_config": {"theirs": 1}, "steer_slots": 5, "seed": 1}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_modle_len", "; did you mean max_model_len?"),
        ("gpu_memory_utilisation", "; did you mean gpu_memory_utilization?"),
        ("steer_slot", "; did you mean steer_slots?"),
        ("steer_allow_unverifed", "; did you mean steer_allow_unverified?"),
        ("qqqqqqqq", ""),
        ("steer_qqqqqqqq", ""),
    ],
)
def test_an_unknown_argument_is_refused_with_the_name_that_was_meant(name: str, hint: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        engine_args_for(MODEL, {name: 1})

    assert str(raised.value) == f"{name}: no such engine argument{hint}"
    assert raised.value.reason == "UNKNOWN_ARGUMENT"


@pytest.mark.parametrize("name", REFUSALS)
def test_unsupported_arguments_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(Unsupported, match=r"^\w+: 'something else' is refused: ") as raised:
        engine_args_for(MODEL, {name: "something else"})

    assert raised.value.field == name
    assert raised.value.reason == "ARGUMENT_REFUSED"
    assert raised.value.message.endswith(REFUSALS[name].reason)


@pytest.mark.parametrize(
    "arguments",
    [
        {"otlp_traces_endpoint": "http://collector:4317", "disable_log_stats": True},
        {"prefill_context_parallel_size": 2},
        {"decode_context_parallel_size": 2},
        {"enable_hc_sp": True},
        {"cpu_offload_gb": 1},
        {"data_parallel_external_lb": True},
        {"data_parallel_backend": "ray"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {"kv_transfer_config": object()},
        {"runner": "pooling"},
        {"enable_sleep_mode": True},
        {"skip_tokenizer_init": True},
        {"distributed_executor_backend": "ray"},
        {"worker_cls": "some.other.Worker"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_would_break_a_promise_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        engine_args_for(MODEL, arguments)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, refusal in REFUSALS.items() for value in refusal.allowed]
)
def test_values_under_which_nothing_is_lost_are_taken(name: str, value: object) -> None:
    engine_args_for(MODEL, {name: value})


def test_every_refusal_names_an_argument_of_vllm() -> None:
    assert set(REFUSALS) <= set(DEFAULTS)  # a name that vLLM dropped or changed refuses nothing any more


def test_no_default_of_vllm_is_refused() -> None:
    assert {name: DEFAULTS[name] for name in REFUSALS if DEFAULTS[name] not in REFUSALS[name].allowed} == {}


def test_every_refusal_is_documented() -> None:
    section = (
        (Path(__file__).parents[2] / "docs" / "compatibility.md")
        .read_text()
        .split("\n## What is refused\n")[1]
        .split("\n## ")[0]
    )

    assert set(REFUSALS) - set(re.findall(r"`(\w+)`", section)) == set()


def finished(
    *, enable_sp: bool = False, data: int = 1, is_moe: bool = False, pipeline: int = 1, mode: int = 2
) -> SimpleNamespace:
    """What the check reads of vLLM's finished configuration."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=data, pipeline_parallel_size=pipeline),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=enable_sp), mode=mode),
        model_config=SimpleNamespace(is_moe=is_moe),
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (finished(enable_sp=True), "sequence parallelism"),
        (finished(data=2, is_moe=True), "replicas of a mixture-of-experts model"),
        (finished(pipeline=2, mode=0), "a pipeline without compilation"),
    ],
)
def test_arguments_that_only_the_final_configuration_shows_are_refused(config: SimpleNamespace, reason: str) -> None:
    with pytest.raises(Unsupported, match=f"^[a-z_]+: {reason}"):
        check_finished_config(config, is_cpu=True)


def test_a_finished_configuration_that_is_proven_passes() -> None:
    for config in (finished(), finished(data=2, pipeline=2), finished(is_moe=True), finished(mode=0)):
        check_finished_config(config, is_cpu=True)
    check_finished_config(finished(pipeline=2, mode=0), is_cpu=False)


@given(
    st.integers(1, 10**6),
    st.integers(1, 2**40),
    st.integers(0, 2**40),
    st.integers(1, 1000),
    st.integers(1, 1000),
    st.sampled_from([True, False, *map(str, LayerOutput)]),
    st.text(),
    st.sampled_from(["/dev/shm", "/tmp"]),
    st.sampled_from(["600", "640", "0644"]),
    st.sampled_from(["", "root", "12"]),
)
def test_our_arguments_reach_the_workers(
    slots: int,
    bank_bytes: int,
    staging_bytes: int,
    operations_per_layer: int,
    constraint_seconds: int,
    allow_unverified: bool | str,
    trace: str,
    shm_dir: str,
    shm_mode: str,
    shm_group: str,
) -> None:
    ours = {
        "slots": slots,
        "bank_bytes": bank_bytes,
        "staging_bytes": staging_bytes,
        "operations_per_layer": operations_per_layer,
        "constraint_seconds": constraint_seconds,
        "allow_unverified": allow_unverified,
        "trace": trace,
        "shm_dir": shm_dir,
        "shm_mode": shm_mode,
        "shm_group": shm_group,
    }

    args = engine_args_for(MODEL, {f"steer_{name}": value for name, value in ours.items()})

    assert asdict(SteeringConfig.from_vllm(args)) == ours


def test_without_ours_the_defaults_hold() -> None:
    assert SteeringConfig.from_vllm(engine_args_for(MODEL, {})) == SteeringConfig()


@pytest.mark.parametrize("name", ["slots", "bank_bytes", "operations_per_layer", "constraint_seconds"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None])
def test_a_size_that_is_not_a_positive_integer_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"steer_{name}: {value!r} is not a positive integer"):
        engine_args_for(MODEL, {f"steer_{name}": value})


@pytest.mark.parametrize("value", [-1, 1.5, "8", True, None])
def test_a_size_of_the_staging_buffer_that_is_none_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"steer_staging_bytes: {value!r} is not a number of bytes"):
        engine_args_for(MODEL, {"steer_staging_bytes": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("shm_dir", "/no/such/directory"), ("shm_mode", "666"), ("shm_mode", "x"), ("shm_group", "no such group")],
)
def test_a_place_for_captures_that_cannot_be_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine_args_for(MODEL, {f"steer_{name}": value})
    assert refused.value.field == f"steer_{name}"


@pytest.mark.parametrize("value", ["false", "two_tensors", "", 0, 1, None])
def test_an_unknown_layer_output_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"steer_allow_unverified: {value!r} is not True, False or one of"):
        engine_args_for(MODEL, {"steer_allow_unverified": value})


@given(st.integers(1, 2**40), st.integers(1, 20_000))
def test_a_bank_takes_no_more_memory_than_it_may_unless_one_row_does(bank_bytes: int, hidden_size: int) -> None:
    rows = SteeringConfig(bank_bytes=bank_bytes).bank_size(hidden_size).rows

    assert rows == 1 or rows * hidden_size * 4 <= bank_bytes
    assert 1 <= rows <= 65536


def test_a_bank_has_the_size_asked_for() -> None:
    config = SteeringConfig(slots=3, bank_bytes=4 * 100 * 7, operations_per_layer=2)

    assert config.bank_size(100) == BankSize(slots=3, rows=7, operations_per_layer=2)


def test_the_compile_cache_is_keyed_by_the_version_of_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SteeringConfig().to_additional_config()
    monkeypatch.setattr(steering_config, "GRAPH_VERSION", steering_config.GRAPH_VERSION + 1)

    assert SteeringConfig().to_additional_config() != before


def test_the_flag_of_unverified_families_has_every_form_of_a_layers_output() -> None:
    assert list(steering_config.LAYER_OUTPUTS) == [*LayerOutput]
    assert SteeringConfig(allow_unverified=True).unverified == LayerOutput.HIDDEN_AND_RESIDUAL


def test_the_command_line_has_vllms_flags_and_ours() -> None:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)

    flags = set(parser._option_string_actions)

    assert {"--max-model-len", "--dtype", "--enforce-eager", "--gpu-memory-utilization", "--max-num-seqs"} <= flags
    assert {flag_of(field.name) for field in fields(SteeringConfig)} <= flags
    assert {"--steer-slots", "--shm-dir", "--shm-mode", "--shm-group"} <= flags
    assert "--steer-shm-dir" not in flags  # it is the server's as well


def test_an_empty_command_line_gives_the_defaults_and_they_are_taken() -> None:
    vllms = AsyncEngineArgs.from_cli_args(AsyncEngineArgs.add_cli_args(argparse.ArgumentParser()).parse_args([]))
    arguments = engine_arguments_from(parsed())

    assert set(arguments) == set(DEFAULTS) | {f"steer_{field.name}" for field in fields(SteeringConfig)}
    args = engine_args_for(MODEL, arguments)
    assert SteeringConfig.from_vllm(args) == SteeringConfig()
    for name in set(DEFAULTS) - CHANGED:
        assert getattr(args, name) == getattr(vllms, name)


def test_command_line_flags_reach_the_engine() -> None:
    line = "--max-model-len 512 --dtype float32 --enforce-eager --served-model-name mine --no-enable-prefix-caching"
    ours = "--steer-slots 7 --steer-bank-bytes 4096 --steer-operations-per-layer 3 --steer-allow-unverified"
    ours += " --steer-staging-bytes 1048576"

    args = engine_args_for(MODEL, engine_arguments_from(parsed(*line.split(), *ours.split())))

    assert (args.max_model_len, args.dtype, args.enforce_eager) == (512, "float32", True)
    assert args.served_model_name in ("mine", ["mine"])
    assert args.enable_prefix_caching is False
    assert SteeringConfig.from_vllm(args) == SteeringConfig(
        slots=7, bank_bytes=4096, operations_per_layer=3, allow_unverified=True, staging_bytes=1 << 20
    )


@pytest.mark.parametrize(("line", "unverified"), [("", ""), (" one_tensor", "one_tensor")])
def test_the_flag_names_the_output_of_unverified_layers(line: str, unverified: str) -> None:
    config = SteeringConfig.from_vllm(
        engine_args_for(MODEL, engine_arguments_from(parsed(*f"--steer-allow-unverified{line}".split())))
    )

    assert config.unverified == (unverified or LayerOutput.HIDDEN_AND_RESIDUAL)
    assert SteeringConfig().unverified == ""


def test_a_refusal_holds_on_the_command_line_too() -> None:
    with pytest.raises(Unsupported) as raised:
        engine_args_for(MODEL, engine_arguments_from(parsed("--decode-context-parallel-size", "2")))

    assert raised.value.field == "decode_context_parallel_size"


def test_adapters_stand_on_the_command_line_by_name() -> None:
    arguments = engine_arguments_from(parsed("--enable-lora", "--lora-modules", "sea=/a/b", "land=/c=d"))

    assert arguments["lora_modules"] == {"sea": "/a/b", "land": "/c=d"}
    assert arguments["enable_lora"] is True


@pytest.mark.parametrize("text", ["sea", "=/a", "sea=", "sea=/a sea=/b"])
def test_an_adapter_without_a_name_of_its_own_or_a_path_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"lora_modules: .* is not NAME=PATH, each name once"):
        engine_arguments_from(parsed("--lora-modules", *text.split()))


def test_the_model_of_the_command_line_is_not_among_the_arguments() -> None:
    assert "model" not in engine_arguments_from(parsed("--model", "another"))


def test_a_worker_reads_what_the_front_end_wrote() -> None:
    config = SteeringConfig(slots=9)

    assert SteeringConfig.from_vllm(SimpleNamespace(additional_config=config.to_additional_config())) == config


def test_a_users_additional_config_is_kept_beside_ours() -> None:
    arguments = engine_args_for("model", {"additional_config": {"theirs": 1}})

    assert arguments.additional_config["theirs"] == 1
    assert "steer" in arguments.additional_config


def test_our_key_of_the_additional_config_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="additional_config"):
        engine_args_for("model", {"additional_config": {"steer": {}}})
