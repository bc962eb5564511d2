"""Names that differ between the supported versions of vLLM, 0.24 to 0.33.

tests/engine/test_seams.py notices a change.
"""

try:
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
except ImportError:  # in 0.24, a refused request is a ValueError, and overload has no error of its own
    REFUSED: tuple[type[Exception], ...] = (ValueError,)
    OVERLOADED: tuple[type[Exception], ...] = ()
else:
    REFUSED = (VLLMClientError,)
    OVERLOADED = (GracefulHTTPError,)
