"""The sampling defaults of a generation config, for an engine that was started with one.

vLLM reads end-of-sequence tokens from the model's generation config in any case. Its sampling defaults count only if
`generation_config` is given: `auto` for the model's, or a folder with another one.

Relies on (vLLM 0.24 to 0.33): `ModelConfig.get_diff_sampling_param`. tests/engine/test_seams.py notices a change.
"""

from dataclasses import replace
from typing import Any

from steer_service.core.backend import ModelInfo
from steer_service.core.checks import check_sampling
from steer_service.core.errors import within
from steer_service.core.sampling_options import DEFAULTS, OUR_DEFAULTS, SamplingDefaults

ARGUMENT = "generation_config"
"""The engine argument that names the config."""

OURS = (None, "vllm")
"""Values with which the defaults of the contract stay."""

OF_THE_MODEL = "auto"
"""The value for the model's own config."""


def sampling_defaults(model_config: Any, asked: str | None, info: ModelInfo) -> SamplingDefaults:
    """The defaults that `asked`, the engine argument, chooses.

    Raises InvalidRequest if the config has a value that no request may have on this model.
    """
    if asked in OURS:
        return OUR_DEFAULTS
    with within(ARGUMENT):
        options = replace(DEFAULTS, **model_config.get_diff_sampling_param())
        check_sampling(options, info)
    return SamplingDefaults(options=options, source="model" if asked == OF_THE_MODEL else "file")
