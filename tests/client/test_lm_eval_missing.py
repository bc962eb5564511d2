"""The class for lm-eval where lm-eval is not installed."""

import importlib
import sys

import pytest


def test_without_lm_eval_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "steer_client.lm_eval_model", raising=False)
    loaded = [name for name in sys.modules if name.startswith("lm_eval.")]
    for name in ("lm_eval", "lm_eval.api.model", *loaded):  # as if it were not installed
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ModuleNotFoundError, match=r"run: pip install '\.\[lm-eval\]' in a checkout"):
        importlib.import_module("steer_client.lm_eval_model")
