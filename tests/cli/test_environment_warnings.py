"""Every command warns about an unknown STEERLLM_ variable, on standard error, and runs all the same."""

import pytest

from steer_service.cli.main import main


@pytest.mark.parametrize("command", ["generate", "capture"])
def test_a_command_warns_about_an_unknown_variable_once(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERLLM_STAL_S", "5")

    with pytest.raises(SystemExit) as exited:
        main([command, "--help"])

    printed = capsys.readouterr()
    assert exited.value.code == 0
    assert printed.err == (
        "steer: warning: STEERLLM_STAL_S is not a known variable; did you mean STEERLLM_SEND_TIMEOUT_S?\n"
    )
    assert "STEERLLM_STAL_S" not in printed.out


def test_a_command_is_silent_about_known_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERLLM_SEND_TIMEOUT_S", "5")

    with pytest.raises(SystemExit):
        main(["generate", "--help"])

    assert capsys.readouterr().err == ""
