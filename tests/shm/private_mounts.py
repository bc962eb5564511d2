"""Runs a script where a folder is a file system of its own, small or full."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def in_private_mounts(line: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-m", "sh", "-c", line, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def on_tmpfs(options: str, folder: Path, script: str) -> dict[str, Any]:
    """What `script` prints as JSON, run where `folder` is a tmpfs of these options; skips if not permitted."""
    mount = f'mount -t tmpfs -o {options} tmpfs "$0"'
    if shutil.which("unshare") is None or in_private_mounts(mount, folder).returncode != 0:
        pytest.skip("a private mount namespace is not permitted here")
    done = in_private_mounts(f'{mount} && exec "$@"', folder, sys.executable, "-c", script, str(folder))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer
