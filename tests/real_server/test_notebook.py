"""The notebook runs on the bundled model, and its kept outputs are those of a clean run."""

import os
import re
import tempfile

import pytest

from tests.examples.node import EXAMPLES
from tests.real_server.serving import Server

NOTEBOOK = EXAMPLES / "notebooks" / "steering.ipynb"
MOST_BYTES = 300_000
BOUND_S = 120
"""Seconds that a cell may take; all of them take about ten."""

nbformat = pytest.importorskip("nbformat", reason="the packages of the extra dev are missing")


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def plots_in(cell) -> list[str]:
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_every_cell_runs_and_prints_what_the_kept_notebook_shows(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    monkeypatch.setenv("STEERLLM_ADDRESS", server.address)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    kept, run = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:  # sockets need a short path
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/socket")
        folders = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(run, km=kernel, timeout=BOUND_S, resources=folders).execute(cleanup_kc=True)

    compared = 0
    for before, after in zip(kept.cells, run.cells, strict=True):
        if before.cell_type == "code":
            assert len(plots_in(after)) == len(plots_in(before)), before.source
            assert bool(printed(after)) == bool(printed(before)), before.source
        if "deterministic" in before.metadata.get("tags", ()):
            assert printed(after) == printed(before), before.source
            compared += 1
    assert compared == 4


def test_the_kept_notebook_says_nothing_about_the_machine_that_ran_it() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]

    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(len(plots_in(cell)) for cell in code) == 3
    assert {kind for cell in code for kind in cell.metadata} <= {"tags"}  # no times
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    text = "".join(printed(cell) + cell.source for cell in kept.cells if cell.cell_type == "code")
    assert re.findall(r"(?:^|[\s\"'(])/\w+/\S+", text) == []  # no path of a machine
