"""End-of-sequence tokens beyond the model's vocabulary are forgotten, and no others."""

from types import SimpleNamespace
from typing import Any

import pytest

from steer_service.engine.vllm_patches.end_tokens import drop_unknown_end_tokens


def llm(token: int | None, others: Any) -> SimpleNamespace:
    """What is read of vLLM's AsyncLLM, of a model of 100 ids."""
    fields = {} if others is None else {"eos_token_id": others}
    return SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: 100),
        renderer=SimpleNamespace(get_eos_token_id=lambda: token),
        input_processor=SimpleNamespace(generation_config_fields=fields),
    )


@pytest.mark.parametrize(
    ("token", "others", "kept", "others_kept"),
    [
        (99, [3, 99], 99, [3, 99]),
        (100, [100, 3], None, [3]),
        (100, 100, None, None),
        (7, 7, 7, [7]),
        (None, None, None, None),
    ],
)
def test_only_tokens_of_the_model_are_kept(token: int | None, others: Any, kept: int | None, others_kept: Any) -> None:
    engine = llm(token, others)

    drop_unknown_end_tokens(engine)

    assert engine.renderer.get_eos_token_id() == kept
    assert engine.input_processor.generation_config_fields.get("eos_token_id") == others_kept
