"""Prometheus' own checks of the page of metrics and of the alerts."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.queries import ALERTS, own_part

PROMTOOL = shutil.which("promtool")

pytestmark = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed; on Debian it is in the package prometheus"
)


def promtool(*arguments: str, page: str = "") -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run(
        [PROMTOOL, *arguments],
        input=page,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent,
    )


async def test_the_servers_own_series_follow_the_conventions(page: str) -> None:
    answer = promtool("check", "metrics", page=own_part(page))
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


async def test_a_series_that_does_not_is_noticed(page: str) -> None:
    answer = promtool("check", "metrics", page=own_part(page) + "# TYPE steerllm_slips counter\nsteerllm_slips 1\n")
    assert answer.returncode != 0
    assert "steerllm_slips" in answer.stderr


def test_the_alerts_are_valid() -> None:
    answer = promtool("check", "rules", str(ALERTS))
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_alerts_fire_when_they_should_and_not_else() -> None:
    answer = promtool("test", "rules", "alerts_test.yaml")
    assert answer.returncode == 0, answer.stdout + answer.stderr
