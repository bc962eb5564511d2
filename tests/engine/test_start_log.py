"""A start that fails says why: the exception of the process that failed, and where the whole log is."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from steer_service.engine.start_log import LSCPU, StartLog, root_cause
from tests.tiny_models import ModelFolder

REPORTED = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"

LOG = """\
(EngineCore pid=7) ERROR 11-28 14:03:02 [core.py:1446] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-28 14:03:02 [core.py:1446] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-28 14:03:02 [core.py:1446]     raise ValueError(
(EngineCore pid=7) ERROR 11-28 14:03:02 [core.py:1446] ValueError: No available memory for the cache blocks.
(EngineCore pid=7) INFO 11-28 14:03:02 [multiproc_executor.py:479] [shutdown] Executor: waiting: really
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""

PROGRAM = """
import os, subprocess, sys
from steer_service.engine.start_log import StartLog

log = StartLog()
try:
    with log:
        os.write(1, b"to output\\n")
        child = [sys.executable, "-c", "import sys; print('from a child'); sys.exit('lib.OddError: too odd')"]
        subprocess.run(child, check=True)
except subprocess.CalledProcessError as error:
    print("cause:", log.cause_of(error))
"""


def test_the_cause_is_the_last_exception_that_does_not_point_to_another() -> None:
    assert root_cause(LOG, REPORTED) == "ValueError: No available memory for the cache blocks."


def test_a_log_without_an_exception_leaves_what_was_reported() -> None:
    assert root_cause("INFO: all is well\nnothing here\n", REPORTED) == REPORTED


def test_a_killed_process_is_named_with_the_usual_cause() -> None:
    reported = "Engine core initialization failed. Failed core proc(s): {'EngineCore_DP0': -9}"
    assert root_cause(LOG, reported) == "a process of vLLM was ended by SIGKILL; the usual cause is too little memory"


NO_SYS = """\
lscpu: failed to determine number of CPUs: /sys/devices/system/cpu/possible: No such file or directory
(EngineCore pid=7) ERROR 11-28 14:03:02 [core.py:1446] subprocess.CalledProcessError: Command 'lscpu --json' returned \
non-zero exit status 1.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_an_lscpu_that_fails_is_explained_with_what_it_says() -> None:
    cause = root_cause(NO_SYS, REPORTED)
    assert "(failed to determine number of CPUs: /sys/devices/system/cpu/possible: No such file or directory)" in cause
    assert "mount /sys" in cause
    silent = root_cause(NO_SYS.partition("\n")[2], REPORTED)
    assert "exit status 1." in silent
    assert "mount /sys" in silent


@pytest.mark.engine
def test_lscpu_is_called_as_vllm_calls_it() -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    [folder] = found.submodule_search_locations or ()
    assert f'"{LSCPU}"' in (Path(folder) / "utils" / "cpu_resource_utils.py").read_text(encoding="utf-8")


def test_output_of_children_is_shown_kept_and_searched() -> None:
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert "to output\n" in answer.stdout
    assert "from a child\n" in answer.stdout
    assert answer.stderr == "lib.OddError: too odd\n"
    found = re.search(r"cause: OddError: too odd \(whole log: (.+)\)\n", answer.stdout)
    assert found is not None
    log = Path(found[1])
    try:
        assert log.read_text().count("\n") == 3
    finally:
        log.unlink()


def test_a_start_that_succeeds_leaves_no_file_and_gives_the_descriptors_back() -> None:
    before = [os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)]
    with StartLog() as log:
        path = log.path
        assert path is not None
        with StartLog() as second:  # its output is part of the first one's
            assert second.path is None
    assert not path.exists()
    assert [os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)] == before


@pytest.mark.engine
def test_a_real_start_that_fails_gives_vllms_own_reason_and_the_log(model_folder: ModelFolder) -> None:
    flags = ("--kv-cache-memory-bytes", "4096", "--enforce-eager", "--dtype", "float32", "--port", "0")
    answer = subprocess.run(
        [sys.executable, "-m", "steer_service.cli", "serve", str(model_folder("llama")), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    last = answer.stderr.splitlines()[-1]
    sentence = r"steer: vLLM did not start: ValueError: (?P<message>.+) \(whole log: (?P<log>.+)\) \(START_FAILED\)"
    found = re.fullmatch(sentence, last)
    assert answer.returncode == 1
    assert found is not None, last
    log = Path(found["log"])
    try:
        assert found["message"] in log.read_text()
        assert "cache" in found["message"]
    finally:
        log.unlink()
