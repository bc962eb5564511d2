"""How much capture memory there is, and how much of it one client may have: environment variables and defaults."""

from collections.abc import Callable

import pytest

from steer_service.cli.exit_status import BAD_USAGE
from steer_service.cli.main import main
from steer_service.core.errors import InvalidRequest
from steer_service.engine.config import client_memory_budget, shared_memory_budget

BUDGETS = pytest.mark.parametrize(
    ("variable", "budget", "default_gib"),
    [
        ("STEERLLM_MAX_SHM_GB", shared_memory_budget, 128),
        ("STEERLLM_CLIENT_SHM_GB", lambda: client_memory_budget(128 << 30, None), 32),
    ],
)


@BUDGETS
def test_a_bad_budget_is_a_sentence_of_the_command(
    variable: str,
    budget: Callable[[], int],
    default_gib: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "abc")
    assert main(["serve", "--help"]) == BAD_USAGE
    assert capsys.readouterr().err == f"steer: {variable}: 'abc' is not a positive number of GiB\n"


@BUDGETS
def test_a_budget_of_capture_memory_is_in_gib(
    variable: str, budget: Callable[[], int], default_gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert budget() == default_gib << 30
    for text, bytes_ in (("1", 1 << 30), ("0.5", 1 << 29), ("1e3", 1000 << 30)):
        monkeypatch.setenv(variable, text)
        assert budget() == bytes_


@BUDGETS
@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "lots", "1,5"])
def test_a_budget_that_is_no_positive_number_is_refused(
    text: str, variable: str, budget: Callable[[], int], default_gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(InvalidRequest, match=f"{variable}: {text!r} is not a positive number of GiB"):
        budget()


@pytest.mark.parametrize(("file_system", "share"), [(None, 25), (1000, 25), (80, 20)])
def test_one_client_has_a_quarter_of_the_capture_memory_that_exists(
    file_system: int | None, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEERLLM_CLIENT_SHM_GB", raising=False)

    assert client_memory_budget(100, file_system) == share
