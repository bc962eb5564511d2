"""Says of each seam into vLLM whether one version has it: python -m tests.engine.check_vllm_version FOLDER ...

FOLDER holds an unpacked wheel (pip download --no-deps vllm==X; python -m zipfile -e vllm-X*.whl FOLDER). vLLM is read
and not imported, so that wheels for devices that are not here can be asked.
"""

import argparse
import sys
from pathlib import Path

from tests.engine.seams import Source, results


def package_in(folder: Path) -> Path:
    """The folder of the package `vllm`, given it or the folder above."""
    for candidate in (folder / "vllm", folder):
        if (candidate / "engine" / "arg_utils.py").exists():
            return candidate
    raise SystemExit(f"{folder}: no vLLM here")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path)
    moved = 0
    for folder in parser.parse_args().folder:
        source = Source(package_in(folder))
        print(f"vLLM {source.version} ({folder})")
        for seam, is_ok, words in results(source):
            moved += not is_ok
            print(f"  {'ok   ' if is_ok else 'MOVED'}  {seam.name} [{seam.used_by}]{': ' + words if words else ''}")
    return min(moved, 1)


if __name__ == "__main__":
    sys.exit(main())
