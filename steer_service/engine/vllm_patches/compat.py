"""What vLLM calls by other names within the supported range, 0.24 to 0.33.

tests/engine/test_seams.py notices a change.
"""

try:
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
except ImportError:  # 0.24: a refused request is a ValueError there, and overload has no error of its own
    REFUSED: tuple[type[Exception], ...] = (ValueError,)
    OVERLOADED: tuple[type[Exception], ...] = ()
else:
    REFUSED = (VLLMClientError,)
    OVERLOADED = (GracefulHTTPError,)
