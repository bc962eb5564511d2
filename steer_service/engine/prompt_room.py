"""Room for a prompt that fills the user's limit of tokens: vLLM wants one token more than it feeds to the model.

A request with max_tokens=0 runs on vLLM with one token that is dropped, so that vLLM refuses a prompt of exactly
`max_model_len` tokens. The engine therefore starts with a limit one higher than the user's, where the model's own
maximum allows it. `ModelInfo.max_model_len` stays the user's number. The token is never fed: no position is beyond it.
Elsewhere a prompt has one token less, which `ModelInfo.max_prompt_tokens` says.
The token may need one more block of the KV cache. If there is memory for the user's limit only, the engine starts again
with that.

Relies on (vLLM 0.24 to 0.33): `EngineArgs.create_model_config`, which `create_engine_config` calls once, and
`ModelConfig.get_and_verify_max_len`, which returns the model's own maximum for None; the sentence with which the check
of the KV cache's memory ends a start. tests/engine/test_seams.py notices a change.
"""

from vllm.config import ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs

THRESHOLDS = (32_768,)
"""Limits above which a model computes something else: Llama 4 scales its attention there."""


class RoomyEngineArgs(AsyncEngineArgs):
    """vLLM's engine arguments, which make room for one token more where they may."""

    has_room = True
    """False: the limit is the user's own."""

    def create_model_config(self) -> ModelConfig:
        """vLLM's configuration of the model, with a limit that is one higher than asked for where the model allows it.

        The maximum of a model with two sets of rotary factors (longrope) is that of the shorter set, so that the
        longer one is never used because of this.
        """
        config: ModelConfig = super().create_model_config()
        asked = self.max_model_len
        if not self.has_room or asked is None or config.max_model_len != asked:
            return config  # it is the model's own, or the memory decides
        if asked in THRESHOLDS or config.is_hybrid:
            return config  # a hybrid model's blocks follow from it
        if self.enable_chunked_prefill is False and self.max_num_batched_tokens == asked:
            return config  # vLLM wants a whole prompt in one step
        if asked < config.get_and_verify_max_len(None):  # type: ignore[arg-type]  # None: the model's own
            config.max_model_len = asked + 1
        return config


def gives_up_room(arguments: AsyncEngineArgs, cause: str) -> bool:
    """Takes the room back if a start ended with `cause` because of it; False if another start would end alike."""
    room = f"max seq len ({(arguments.max_model_len or 0) + 1})"
    if not isinstance(arguments, RoomyEngineArgs) or not arguments.has_room or room not in cause:
        return False
    arguments.has_room = False
    return True


def users_limit(asked: int | None, limit: int) -> int:
    """The limit of tokens that the user asked for, of an engine that runs with `limit`."""
    return asked if asked is not None and asked + 1 == limit else limit


def most_prompt_tokens(limit: int) -> int:
    """Tokens of a prompt at most, of an engine that runs with `limit`: nothing could be run with one that fills it."""
    return limit - 1
