"""The Kubernetes overlays as kustomize renders them, and their parts."""

import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
POD_IP = "192.0.2.1"
RENDERERS = (("kustomize", "build"), ("kubectl", "kustomize"))
"""Programs that render, the first that is installed is used."""


@functools.cache
def objects(overlay: str) -> Sequence[Any]:
    """The objects of an overlay; skips the test if nothing here can render."""
    command = next((list(command) for command in RENDERERS if shutil.which(command[0])), None)
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed: the manifests cannot be rendered here")
    answer = subprocess.run(
        [*command, str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert not answer.stderr, answer.stderr  # warnings about fields of an earlier kustomize
    return [each for each in yaml.safe_load_all(answer.stdout) if each is not None]


def of_kind(overlay: str, kind: str) -> list[Any]:
    return [each for each in objects(overlay) if each["kind"] == kind]


def one(overlay: str, kind: str) -> Any:
    (found,) = of_kind(overlay, kind)
    return found


def pod(overlay: str) -> Any:
    """The pod's template."""
    return one(overlay, "Deployment")["spec"]["template"]


def containers(overlay: str) -> Mapping[str, Any]:
    return {each["name"]: each for each in pod(overlay)["spec"]["containers"]}


def server(overlay: str) -> Any:
    return containers(overlay)["server"]


def environment(overlay: str) -> dict[str, str]:
    """The server's variables as it gets them."""
    values: dict[str, str] = {}
    for variable in server(overlay)["env"]:
        text = variable.get("value", POD_IP)
        for name, value in values.items():  # Kubernetes expands earlier variables only
            text = text.replace(f"$({name})", value)
        values[variable["name"]] = text
    return values


def volumes(overlay: str) -> Mapping[str, Any]:
    return {each["name"]: each for each in pod(overlay)["spec"]["volumes"]}


def mounts(container: Any) -> Mapping[str, Any]:
    """Volume -> its mount."""
    return {each["name"]: each for each in container["volumeMounts"]}


def bytes_of(quantity: str) -> float:
    """The bytes of a quantity such as 2Gi."""
    units = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
    return float(quantity[:-2]) * units[quantity[-2:]]


def texts_in(value: Any) -> Iterator[str]:
    """Every text in an object, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from texts_in(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from texts_in(each)
