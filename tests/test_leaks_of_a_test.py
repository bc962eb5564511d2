"""The plugin that looks for leaks finds each kind of them."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAKS = {
    "tasks": "import asyncio\nasync def test(): asyncio.ensure_future(asyncio.sleep(99)); await asyncio.sleep(0)",
    "threads": "import threading\ndef test(): threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "child processes": "import subprocess\nkept = []\ndef test(): kept.append(subprocess.Popen(['sleep', '30']))",
    "descriptors": "kept = []\ndef test(): kept.append(open('/proc/self/status'))",
    "shared memory": "import pathlib\ndef test(): pathlib.Path('/dev/shm/left-by-a-test').touch()",
}


def test_what_a_test_leaves_fails_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    pytester.makeconftest(
        "import tests.leaks_of_a_test as module\nmodule.SETTLE_S = 0.5\n"
        "def pytest_configure(config): config.pluginmanager.register(module.Leaks())"
    )
    names = {f"test_{kind.replace(' ', '_')}": kind for kind in LEAKS}
    pytester.makepyfile(**{name: LEAKS[kind] + "\n" for name, kind in names.items()})
    monkeypatch.setenv("PYTHONPATH", str(root))
    result = pytester.runpytest_subprocess("-o", "asyncio_mode=auto", "-p", "no:cacheprovider", timeout=60)
    Path("/dev/shm/left-by-a-test").unlink(missing_ok=True)
    result.assert_outcomes(passed=len(LEAKS), errors=len(LEAKS))
    result.stdout.fnmatch_lines_random([f"*the test left {{'{kind}'*" for kind in LEAKS])
