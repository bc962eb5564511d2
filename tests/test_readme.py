"""Every Python example of README.md and docs/ runs against a real server, in a script and in a notebook.

Only the address changes. The examples of one page run in their order and share their names, as for a reader who
copies them one after the other.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import CO_COROUTINE
from pathlib import Path
from shutil import copy
from types import CodeType
from typing import Any

import pytest

from steer_client import AsyncSteerClient, SteerClient, SteeringSpec
from steer_client.channel import ClientOptions
from steer_service.cli.main import main
from steer_service.core.environment import PREFIX
from steer_service.formats.checkpoint import save_spec
from steer_service.server.config import ServerConfig
from steer_service.shm.segments import SegmentDirectory
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.wire.channels import DEFAULT_ADDRESS
from tests.arena import Arena
from tests.client.conftest import Serve, serve  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): re.findall(
        r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
}
"""Page -> its Python examples, in order."""
BLOCKS = [block for blocks in PAGES.values() for block in blocks]
OF_TESTS = [block for block in BLOCKS if "from tests." in block]
IN_PROCESS = [block for block in BLOCKS if "steer_service.engine" in block]
OF_TRAINING = [block for block in BLOCKS if "steer_service.hf" in block]
OF_DATA_SETS = [block for block in BLOCKS if "load_captures" in block]
OF_THE_CLIENT = {
    page: [block for block in blocks if block not in (*OF_TESTS, *IN_PROCESS, *OF_TRAINING, *OF_DATA_SETS)]
    for page, blocks in PAGES.items()
}
WITH_CLIENT_EXAMPLES = [page for page, blocks in OF_THE_CLIENT.items() if blocks]
DEEP_MODEL = replace(FAKE_MODEL, layer_count=30, special_token_ids=(0,))
CALL = re.compile(r"\.(generate|chat|stream|stream_events|score)\(")


class WithStructuredOutputs(FakeBackend):
    """A backend that takes structured outputs, and answers anything."""

    has_structured_outputs = True


def test_the_pages_have_the_examples_they_promise() -> None:
    assert {page: len(OF_THE_CLIENT[page]) for page in WITH_CLIENT_EXAMPLES} == {
        "README.md": 4,
        "docs/capture.md": 5,
        "docs/client.md": 4,
        "docs/migration.md": 2,
        "docs/python.md": 14,
        "docs/quickstart.md": 4,
        "docs/steering.md": 10,
        "docs/training.md": 1,
        "docs/vector_files.md": 1,
    }
    assert len(OF_TESTS) == len(IN_PROCESS) == len(OF_TRAINING) == 1
    assert len(OF_DATA_SETS) == 2


def test_the_examples_of_the_first_page_run_both_in_a_script_and_in_a_notebook() -> None:
    assert [block for block in PAGES["README.md"] if _is_for_scripts_only(block) or _is_for_notebooks_only(block)] == []


@pytest.mark.parametrize("page", WITH_CLIENT_EXAMPLES)
def test_the_examples_of_the_client_run_in_a_script(
    page: str,
    serve: Serve,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _reader(page, serve, tmp_path, monkeypatch) as blocks_and_names:
        for block, names in blocks_and_names:
            if not _is_for_notebooks_only(block):
                exec(compile(block, "example", "exec"), names)


@pytest.mark.leaves("tasks")  # not every example closes its client
@pytest.mark.parametrize("page", WITH_CLIENT_EXAMPLES)
async def test_the_examples_of_the_client_run_in_a_notebook(
    page: str,
    serve: Serve,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _reader(page, serve, tmp_path, monkeypatch) as blocks_and_names:
        for block, names in blocks_and_names:
            if not _is_for_scripts_only(block):
                await _run_cell(block, names)


@contextmanager
def _reader(
    page: str,
    serve: Serve,  # noqa: F811
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
    """The examples of a page, each with the names that the ones before it have left.

    Their folder has the files that commands of the pages write. Makes sure that an example with a call of the client
    has reached the server. Closes the clients at the end.
    """
    if any("torch" in block for block in OF_THE_CLIENT[page]):
        pytest.importorskip("torch")
    backend = WithStructuredOutputs(DEEP_MODEL, place=Arena(SegmentDirectory().path))
    address = serve(backend).address
    monkeypatch.chdir(folder)
    copy(ROOT / "tests" / "directions" / "contrast.jsonl", "feelings.jsonl")
    save_spec("happy", SteeringSpec.simple_add(layer=5, vector=[1.0] * DEEP_MODEL.hidden_size), model=DEEP_MODEL)
    names: dict[str, Any] = {}

    def blocks() -> Iterator[tuple[str, dict[str, Any]]]:
        for block in OF_THE_CLIENT[page]:
            before = backend.finished
            yield block.replace(DEFAULT_ADDRESS, address), names
            if not (_is_for_notebooks_only(block) or _is_for_scripts_only(block)):
                is_refused = "except InvalidRequest" in block
                assert (backend.finished > before) == bool(CALL.search(block) and not is_refused), block

    yield blocks()
    for value in names.values():
        if isinstance(value, SteerClient):
            value.close()


def _is_for_scripts_only(block: str) -> bool:
    return "asyncio.run(" in block


def _is_for_notebooks_only(block: str) -> bool:
    """Whether it awaits outside of a function."""
    code = compile(block, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return bool(code.co_flags & CO_COROUTINE)


async def _run_cell(block: str, names: dict[str, Any]) -> None:
    """Runs an example in the running event loop, as IPython does."""
    code: CodeType = compile(block, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if code.co_flags & CO_COROUTINE:
        await result


def test_a_link_between_pages_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("examples/*/README.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)", _without_code(page)):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
        for target, anchor in re.findall(r"\]\(([^):#\s]*)#([^)\s]+)\)", _without_code(page)):
            aimed = page.parent / target if target else page
            assert anchor in _anchors(aimed), f"{page.name}: {target}#{anchor}"


def test_every_page_of_the_documentation_is_in_both_tables_of_pages() -> None:
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"index.md"}
    for table, link in ((ROOT / "README.md", r"\(docs/(\w+\.md)"), (ROOT / "docs" / "index.md", r"\((\w+\.md)")):
        assert pages - set(re.findall(link, table.read_text(encoding="utf-8"))) == set()


def test_a_long_page_begins_with_its_contents() -> None:
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        text = page.read_text(encoding="utf-8")
        if text.count("\n") <= 150:
            continue
        contents = text[: text.index("\n## ")]
        missing = [heading for heading in _headings(text) if f"](#{_anchor(heading)})" not in contents]
        assert missing == [], f"{page.name} has no entry for {missing}"


def test_every_file_that_a_page_names_exists() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]:
        for name in re.findall(r"`([\w.]+(?:/[\w.]+)+\.py)`", page.read_text(encoding="utf-8")):
            places = [ROOT / name, ROOT / "steer_service" / name]
            assert name.startswith("vllm/") or any(path.exists() for path in places), f"{page.name}: {name}"


def test_every_variable_of_the_server_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    variables = {PREFIX + field.name.upper() for field in fields(ServerConfig)}
    assert variables - set(re.findall(r"`(STEERLLM_[A-Z_]+)`", text)) == set()


def test_every_option_of_a_client_is_documented() -> None:
    section = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").split("\n## Connect\n")[1].split("\n## ")[0]
    for text in (section, AsyncSteerClient.__doc__ or ""):
        assert ClientOptions.__annotations__.keys() - set(re.findall(r"`(\w+)`", text)) == set()


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _headings(text: str) -> list[str]:
    """The sections of a page, without what only looks like one in a code block."""
    return re.findall(r"^## (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_anchor(heading) for heading in re.findall(r"^#+ (.+)$", _without_code(page), re.MULTILINE)}


def test_the_example_of_a_data_set_reads_what_the_command_before_it_wrote(
    serve: Serve,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    commands = re.findall(r"^steer (capture (?:prompts\.txt|labelled\.jsonl) .*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("One prompt\nAnd another\n")
    lines = [{"text": "One prompt", "label": 0}, {"text": "And another", "label": 1}]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    address = serve(FakeBackend(DEEP_MODEL)).address

    for command in commands:
        assert main([*shlex.split(command), "--address", address, "--delivery", "inline"]) == 0
    capsys.readouterr()
    for block in OF_DATA_SETS:
        _run(block, {})

    rows, probe = capsys.readouterr().out.splitlines()
    assert rows == "(4, 8) [0 1 0 1]"  # two prompts of two tokens, of which none was generated
    assert probe == "(2, 8) [0 1]"


@pytest.mark.leaves("threads")  # vLLM starts Python's resource tracker, which keeps the pipe of the start log open
@pytest.mark.leaves("child processes")
@pytest.mark.engine
@pytest.mark.slow
def test_the_example_of_the_engine_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    from steer_service.hf.bundled_model import ensure_bundled_model

    block = IN_PROCESS[0].replace("Qwen/Qwen3-0.6B", str(ensure_bundled_model()))
    block = block.replace("max_model_len=", "enforce_eager=True, max_model_len=")  # compiling takes minutes
    assert "enforce_eager" in block
    _run(block, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_example_of_training_runs(serve: Serve) -> None:  # noqa: F811
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from steer_service.hf.bundled_model import ensure_bundled_model

    backend = FakeBackend(replace(DEEP_MODEL, hidden_size=576))
    block = OF_TRAINING[0].replace("Qwen/Qwen3-0.6B", str(ensure_bundled_model()))
    names: dict[str, Any] = {}
    _run(block.replace(DEFAULT_ADDRESS, serve(backend).address), names)
    assert backend.requests[0].steering == names["trained"].to_spec()
    assert list(backend.requests[0].steering.layers) == [5]
    names["trained"].close_sync()


def _run(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, "example", "exec"), names)
