"""The programs in examples/python without a server; with one: tests/real_server/test_examples.py."""

import pytest

from tests.examples.node import EXAMPLES
from tests.examples.python import PROGRAMS, run_program
from tests.real_server.serving import free_port

LINES_OF_A_PROGRAM = 80


def test_the_page_lists_every_program() -> None:
    page = (EXAMPLES / "README.md").read_text("utf-8")
    assert [name for name in PROGRAMS if f"(python/{name}.py)" not in page] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_fits_on_a_screen_or_two(name: str) -> None:
    assert len((EXAMPLES / "python" / f"{name}.py").read_text("utf-8").splitlines()) <= LINES_OF_A_PROGRAM


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_without_a_server_ends_with_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "probe":
        pytest.importorskip("sklearn")
    address = f"127.0.0.1:{free_port()}"

    with pytest.raises(SystemExit) as end:
        run_program(name, "--address", address)

    assert end.value.code == f"{name}.py: no server answers at {address}: the connection is refused"
    assert capsys.readouterr() == ("", "")


def test_the_capture_program_needs_two_prompts(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    (tmp_path / "one.txt").write_text("One prompt\n")

    with pytest.raises(SystemExit) as end:
        run_program("capture", "--prompts", str(tmp_path / "one.txt"))

    assert end.value.code == 2
    assert "one.txt has 1 prompts; at least two can be compared" in capsys.readouterr().err
