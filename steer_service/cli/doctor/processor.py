"""The processor's cores, which vLLM for the CPU lists with lscpu from /sys."""

import subprocess
from collections.abc import Iterator

from steer_service.cli.doctor.findings import Finding, fail, ok, one_line
from steer_service.cli.doctor.packages import is_for_cpu
from steer_service.engine.start_log import LSCPU, lscpu_problem

LIMIT_S = 30.0
"""Seconds for lscpu, which reads a few files."""


def check_processor(installed: dict[str, str], command: str = LSCPU) -> Iterator[Finding]:
    """Whether vLLM can list the cores. `installed`: its distributions and versions; only that for the CPU does so."""
    if not is_for_cpu(installed):
        return
    try:
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=LIMIT_S, check=False, process_group=0
        )
    except subprocess.TimeoutExpired:
        yield fail("processor", lscpu_problem(f"no answer within {LIMIT_S:g} s"))
        return
    if done.returncode != 0:
        said = one_line(done.stderr.partition("lscpu: ")[2]) or f"exit status {done.returncode}"
        yield fail("processor", lscpu_problem(said))
    else:
        yield ok("processor", "lscpu lists its cores")
