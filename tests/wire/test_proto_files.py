"""The proto files are in the sdist and in the wheel, where `proto_folder` finds them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from steer_service.wire.proto_files import proto_folder

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "bench", "docs", "examples")
"""What a build does not need."""
PROTOS = sorted(path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*.proto"))
BUILD_S = 120.0
"""Seconds that one build may take; it needs no network."""
PRINT_PROTO_FOLDER = "from steer_service.wire.proto_files import proto_folder; print(proto_folder())"

pytest.importorskip("setuptools", minversion="77", reason="builds need setuptools, of the dev extra")


def build(kind: str, source: Path, target: Path) -> Path:
    """The archive that setuptools makes of the folder `source`; `kind` is `sdist` or `wheel`."""
    target.mkdir()
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, target], cwd=source, capture_output=True, timeout=BUILD_S, check=True
    )
    (archive,) = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    # A build leaves its outputs beside the source, so it gets a copy.
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE, symlinks=True)
    with tarfile.open(build("sdist", source, folder / "archive")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, made from the sdist as package indexes and `python -m build` do it."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", sdist, folder / "archive")) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def protos_under(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.proto"))


def test_a_checkout_has_its_own_proto_folder() -> None:
    assert proto_folder().resolve() == ROOT / "proto"


def test_the_sdist_has_every_proto_file(sdist: Path) -> None:
    assert protos_under(sdist / "steer_service" / "proto") == PROTOS


def test_the_wheel_has_every_proto_file(wheel: Path) -> None:
    assert protos_under(wheel / "steer_service" / "proto") == PROTOS


def test_stubs_can_be_made_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    grpc_tools = pytest.importorskip("grpc_tools", reason="stubs are made with grpcio-tools, of the dev extra")
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    found = subprocess.run(
        [sys.executable, "-c", PRINT_PROTO_FOLDER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.strip()
    assert found == str(wheel / "steer_service" / "proto")

    well_known_types = Path(grpc_tools.__file__).parent / "_proto"
    command = ["-m", "grpc_tools.protoc", f"-I{found}", f"-I{well_known_types}", f"--python_out={tmp_path}"]
    subprocess.run([sys.executable, *command, *map(str, PROTOS)], cwd=tmp_path, timeout=60, check=True)

    assert len(list(tmp_path.glob("steer/v1/*_pb2.py"))) == len(PROTOS)
