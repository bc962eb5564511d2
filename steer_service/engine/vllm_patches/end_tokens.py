"""Keeps end-of-sequence tokens that the model does not have from the workers.

A tokenizer may have more ids than its model, and its end-of-sequence token may be one of them. The model cannot
generate it, but with `min_tokens` vLLM masks it in the logits, beyond their end, and the worker dies.

Relies on (vLLM 0.24 to 0.33): the end token being asked of `renderer.get_eos_token_id()` for every request, and others
being in `input_processor.generation_config_fields`. tests/engine/test_seams.py notices a change.
"""

from typing import Any


def drop_unknown_end_tokens(llm: Any) -> None:
    """Makes this AsyncLLM forget end-of-sequence tokens that are outside the model's vocabulary."""
    vocab_size = llm.model_config.get_vocab_size()
    token = llm.renderer.get_eos_token_id()
    if token is not None and token >= vocab_size:
        llm.renderer.get_eos_token_id = lambda: None  # on the instance: other engines are unchanged
    fields = llm.input_processor.generation_config_fields
    tokens = fields.get("eos_token_id")
    if tokens is not None:
        known = [token for token in (tokens if isinstance(tokens, list) else [tokens]) if token < vocab_size]
        fields["eos_token_id"] = known or None
