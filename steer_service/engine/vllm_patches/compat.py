"""Names that differ between the supported versions of vLLM.

Relies on (vLLM 0.24 to 0.33): one of two names for each thing. tests/engine/test_seams.py notices a change.
"""

from vllm import SamplingParams

try:
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
except ImportError:  # in 0.24, a refused request is a ValueError, and overload has no error of its own
    REFUSED: tuple[type[Exception], ...] = (ValueError,)
    OVERLOADED: tuple[type[Exception], ...] = ()
else:
    REFUSED = (VLLMClientError,)
    OVERLOADED = (GracefulHTTPError,)

HAS_STREAM_INTERVAL = "stream_interval" in SamplingParams.__struct_fields__
"""True if vLLM lets one request wait for several tokens of a delta; in 0.24, only all requests of an engine do."""
