"""A pytest plugin: lets vLLM run its V2 model runner on a CPU, with all of its Triton kernels interpreted.

vLLM wants a Triton with the backend `cpu`, of which it asks no more than that it is there as long as Triton interprets.
It must come before vLLM is imported. With TRITON_INTERPRET=1 and VLLM_USE_V2_MODEL_RUNNER=1; see test_v2.py.
"""

from typing import Any

from triton.backends import Backend, backends
from triton.backends.driver import DriverBase


class NoDriver(DriverBase):
    """Never active: nothing is compiled."""

    @classmethod
    def is_active(cls) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"Triton's interpreter asks for no {name}")


backends["cpu"] = Backend(None, NoDriver)
