"""Every flag and variable in the manifests is one that `steer serve` takes, with a value that it accepts."""

import argparse
import re
from pathlib import Path

import pytest

from steer_service.core.environment import PREFIX, VARIABLES, unknown_variable_warnings
from steer_service.server.config import ServerConfig
from tests.deploy.rendered import OVERLAYS, containers, environment, pod, server, texts_in

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@each_overlay
def test_every_variable_is_known(overlay: str) -> None:
    names = {each["name"] for container in containers(overlay).values() for each in container.get("env", ())}
    assert len(names) > 10
    ours = {name: "" for name in names if name.startswith(PREFIX)}
    assert unknown_variable_warnings(ours) == []
    mentioned = {name for text in texts_in(pod(overlay)) for name in re.findall(rf"\b{PREFIX}[A-Z_]+", text)}
    assert mentioned <= set(VARIABLES)


@each_overlay
def test_no_service_adds_variables_that_look_like_settings(overlay: str) -> None:
    assert pod(overlay)["spec"]["enableServiceLinks"] is False


@each_overlay
def test_the_command_line_is_accepted(overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from steer_service.cli.serve import add_arguments
    from steer_service.cli.server_flags import config_from

    variables = environment(overlay) | {"STEERLLM_SHM_DIR": str(tmp_path)}  # the folder is the pod's
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = config_from(parser.parse_args(server(overlay)["args"]))

    assert config == ServerConfig.from_environment(variables)
    assert config.segments.mode == 0o640
    assert config.segments.group == pod(overlay)["spec"]["securityContext"]["fsGroup"]
    assert config.insecure == (config.certificates is None)
