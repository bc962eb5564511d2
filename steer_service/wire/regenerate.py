"""Makes the stubs in this folder from `proto/steer/v1`: `python -m steer_service.wire.regenerate [--check]`.

Needs a checkout and grpcio-tools 1.76.0, the oldest supported: its stubs load on every later runtime, newer ones do
not load on older runtimes.
"""

import argparse
import importlib.metadata
import re
import sys
import tempfile
from pathlib import Path

TOOLS_VERSION = "1.76.0"
STUBS = Path(__file__).parent
PROTO = STUBS.parent.parent / "proto"

_IMPORT = re.compile(r"^from steer\.v1 import", re.MULTILINE)


def generate(target: Path) -> None:
    """Writes the stubs of every proto file into the folder `target`, which exists."""
    from grpc_tools import protoc

    protos = sorted(str(path) for path in (PROTO / "steer" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        status = protoc.main(["protoc", f"-I{PROTO}", f"-I{_well_known_types()}", *outputs, *protos])
        if status != 0:
            raise RuntimeError(f"protoc ended with status {status}")
        for stub in sorted(Path(folder, "steer", "v1").iterdir()):
            if stub.read_text().strip() and not _is_empty_service(stub):
                (target / stub.name).write_text(_at_home(stub.read_text()))


def differences(target: Path) -> list[str]:
    """Names of the committed stubs that differ from those in the folder `target`, or lack, or are too many."""
    names = {path.name for folder in (STUBS, target) for path in folder.glob("*_pb2*.py*")}
    return sorted(name for name in names if _text(STUBS / name) != _text(target / name))


def main() -> int:
    """Regenerates, or with `--check` compares; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m steer_service.wire.regenerate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the stubs are out of date")
    check = parser.parse_args().check
    found = importlib.metadata.version("grpcio-tools")
    if found != TOOLS_VERSION:
        print(f"grpcio-tools {found} is installed; the stubs are made with {TOOLS_VERSION}", file=sys.stderr)
        return 1
    if not check:
        generate(STUBS)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = differences(Path(folder))
    if stale:
        print(f"out of date, run `make proto`: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


def _well_known_types() -> Path:
    import grpc_tools

    return Path(grpc_tools.__file__).parent / "_proto"


def _at_home(stub: str) -> str:
    # The contract's files import each other as steer/v1/..., in every language; Python's package is another one.
    return _IMPORT.sub("from steer_service.wire import", stub)


def _is_empty_service(stub: Path) -> bool:
    return stub.name.endswith("_pb2_grpc.py") and "class " not in stub.read_text()


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
