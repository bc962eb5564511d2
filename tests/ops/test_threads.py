"""The CPU kernel on several threads does what it does on one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from steer_service.core.specs import AblationSpec, AddSpec, SteeringOp
from tests.ops.kernels import KERNEL
from tests.ops.step import BITS, ParsedPrompt, Step

pytestmark = pytest.mark.skipif(KERNEL != "cpu", reason="a GPU's threads are not torch's")
WIDTH = 64


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def a_step(rows: int) -> Step:
    """Two requests, steered and captured, and one of whose rows every fifth is bad."""
    random = np.random.default_rng(rows)
    hidden_TD, residual_TD = (torch.tensor(random.normal(size=(rows, WIDTH))).bfloat16() for _ in range(2))
    first, second = rows // 3, 2 * rows // 3
    hidden_TD[second::5] = torch.nan

    def operations() -> list[SteeringOp]:
        return [AddSpec(random.normal(size=WIDTH), 2.0), AblationSpec(random.normal(size=WIDTH), 0.5)]

    asked = [
        ParsedPrompt(range(first), operations(), captured=True),
        ParsedPrompt(range(first, second), operations(), captured=True, captures_float32=True),
        ParsedPrompt(range(second, rows), operations()),
    ]
    return Step(hidden_TD, residual_TD, asked, checks=True)


@pytest.mark.parametrize("rows", [3, 16, 23, 24, 25, 200])
def test_rows_have_the_same_bits_on_any_number_of_threads(rows: int) -> None:
    with threads(1):
        alone = a_step(rows)
    with threads(3):
        shared = a_step(rows)
    with threads(2):
        again = a_step(rows)

    for step in (shared, again):
        for left, right in (
            (alone.hidden_TD, step.hidden_TD),
            (alone.stream_TD, step.stream_TD),
            *zip(alone.before, step.before, strict=True),
            *zip(alone.captured, step.captured, strict=True),
        ):
            assert torch.equal(left.view(BITS[left.dtype]), right.view(BITS[right.dtype]))
        assert np.array_equal(alone.plan.bad_N, step.plan.bad_N)
    assert alone.plan.bad_N.any()


def test_all_rows_are_steered_by_fewer_threads_than_requested() -> None:
    mine = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "same_bits"]
    limited = subprocess.run(mine, env={**os.environ, "OMP_THREAD_LIMIT": "2"}, capture_output=True, text=True)
    assert limited.returncode == 0, limited.stdout
