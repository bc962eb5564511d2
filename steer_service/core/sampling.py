"""What a sampling option that was not given becomes, on every backend."""

from dataclasses import replace

from steer_service.core.request import SamplingOptions

DEFAULT_MAX_TOKENS = 256
DEFAULT_TEMPERATURE = 1.0

DEFAULTS = SamplingOptions(
    n=1,
    max_tokens=DEFAULT_MAX_TOKENS,
    min_tokens=0,
    temperature=DEFAULT_TEMPERATURE,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    ignore_eos=False,
    skip_special_tokens=True,
    include_stop=False,
)
"""What None means; `seed` and `logprobs` have no default."""


def effective_options(asked: SamplingOptions, prompt_tokens: int, max_model_len: int) -> SamplingOptions:
    """`asked` with every default filled in, and no more tokens than the model has room for."""
    filled = {
        name: getattr(DEFAULTS, name)
        for name in SamplingOptions.__dataclass_fields__
        if getattr(asked, name) is None and getattr(DEFAULTS, name) is not None
    }
    options = replace(asked, **filled)
    room = max_model_len - prompt_tokens
    assert options.max_tokens is not None
    assert options.min_tokens is not None
    if options.max_tokens <= room:
        return options
    return replace(options, max_tokens=room, min_tokens=min(options.min_tokens, room))
