"""Prompts that fill the limit of tokens: the engine starts with one more, where the model's own maximum allows it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TokenPrompt
from steer_service.engine import VLLMSteeringModel
from steer_service.engine.config import engine_args_for
from steer_service.engine.prompt_room import gives_up_room, most_prompt_tokens, users_limit
from steer_service.hf import HFSteeringModel
from tests.engine.conftest import BLOCK, ENGINE_ARGUMENTS
from tests.engine.oracle import relative_error
from tests.tiny_models import ModelFolder

LEARNED = 64
"""Positions that the small GPT-2 has learned."""
FITTING = 32
"""A limit of whole blocks of the KV cache."""
ROWS = CaptureSpec(layers=(0, 1))


@pytest.fixture(scope="module")
def learned_positions(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=LEARNED, n_embd=64, n_layer=2, n_head=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder("llama") / name).read_bytes())
    return folder


def limit_of(folder: Path, **arguments: Any) -> int:
    return engine_args_for(str(folder), arguments).create_model_config().max_model_len


def test_vllm_gets_one_token_more_below_the_models_own_maximum(learned_positions: Path) -> None:
    assert limit_of(learned_positions) == LEARNED
    assert limit_of(learned_positions, max_model_len=LEARNED) == LEARNED
    assert limit_of(learned_positions, max_model_len=LEARNED - 1) == LEARNED
    assert limit_of(learned_positions, max_model_len=20) == 21


def test_vllm_gets_no_more_where_it_wants_whole_prompts_in_one_step(learned_positions: Path) -> None:
    whole = {"max_model_len": 20, "max_num_batched_tokens": 20}

    assert limit_of(learned_positions, enable_chunked_prefill=False, **whole) == 20
    assert limit_of(learned_positions, **whole) == 21


def test_the_room_is_taken_back_once_if_the_memory_has_no_place_for_it(learned_positions: Path) -> None:
    arguments = engine_args_for(str(learned_positions), {"max_model_len": 20})

    assert not gives_up_room(arguments, "max seq len (20), 1 GiB KV cache is needed")
    assert gives_up_room(arguments, "max seq len (21), 1 GiB KV cache is needed")
    assert arguments.create_model_config().max_model_len == 20
    assert not gives_up_room(arguments, "max seq len (21), 1 GiB KV cache is needed")


@pytest.mark.parametrize(("asked", "limit", "users"), [(20, 21, 20), (20, 20, 20), (None, 64, 64), (-1, 48, 48)])
def test_the_models_facts_have_the_limit_of_the_user(asked: int | None, limit: int, users: int) -> None:
    assert users_limit(asked, limit) == users
    assert most_prompt_tokens(limit) == limit - 1


@pytest.mark.engine
@pytest.mark.parametrize(
    ("asked", "cache"),
    [
        (LEARNED - 1, {}),
        pytest.param(
            FITTING,
            {"num_gpu_blocks_override": FITTING // BLOCK + 1},
            # It starts twice. vLLM leaves the shared memory of a failed start to Python's resource tracker.
            marks=[pytest.mark.extended, pytest.mark.leaves("shared memory")],
        ),
    ],
)
async def test_a_prompt_fills_the_limit_of_a_model_with_learned_positions(
    asked: int, cache: dict[str, int], learned_positions: Path
) -> None:
    """The last engine has a KV cache of the user's limit and no more, besides vLLM's empty block: it starts twice.

    For the model's own maximum see test_a_prompt_leaves_one_token_of_a_model_s_own_maximum.
    """
    limit = FITTING - 1 if cache else LEARNED - 1
    prompt = TokenPrompt(token_ids=tuple(3 + index % 250 for index in range(limit)))
    arguments = {**ENGINE_ARGUMENTS, "max_model_len": asked, **cache}
    with VLLMSteeringModel(str(learned_positions), **arguments) as model, HFSteeringModel(learned_positions) as hf:
        assert (model.info.max_model_len, model.info.max_prompt_tokens) == (asked, limit)
        generations, [handle] = await model.generate(prompt, max_tokens=0, capture=ROWS, raw_output=True)
        _, [expected] = await hf.generate(prompt, max_tokens=0, capture=ROWS)
        rows, theirs = await handle.fetch(), await expected.fetch()
        longer = TokenPrompt(token_ids=(*prompt.token_ids, 3))
        with pytest.raises(InvalidRequest) as raised:
            await model.generate(longer, max_tokens=0, capture=ROWS)
        await handle.close()
        await expected.close()

    [output] = generations[0].outputs
    assert (output.token_ids, output.finish_reason.value, output.receipt.rows_total) == ([], "length", limit)
    assert generations[0].usage.completion_tokens == 0
    for layer in ROWS.layers:
        assert rows[layer][0]["hidden"].shape == (limit, 64)
        assert relative_error(rows[layer][0]["hidden"], theirs[layer][0]["hidden"]) <= 1e-5
    assert raised.value.reason == "PROMPT_TOO_LONG"
    assert ("needs one token more" in raised.value.message) == (asked != limit)
