"""`buf breaking` compares the contract with proto/baseline.binpb and finds what would break clients."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")
BASELINE = "proto/baseline.binpb"

pytestmark = pytest.mark.skipif(not BUF.exists(), reason="buf is not installed; it comes with the dev extra")


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    """A folder with a copy of the contract, its baseline and buf's settings."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def breaking_changes(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [BUF, "breaking", "--against", BASELINE]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def edit(proto: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, proto.read_text(), flags=re.MULTILINE)
    assert count == 1
    proto.write_text(text)


def test_the_contract_breaks_no_client_of_the_baseline(contract: Path) -> None:
    found = breaking_changes(contract)

    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_a_removed_field_is_found(contract: Path) -> None:
    edit(contract / "proto/steer/v1/info.proto", r"^  string server_version = 1;$", "")

    found = breaking_changes(contract)

    assert found.returncode != 0
    assert 'field "1" with name "server_version" on message "GetServerInfoResponse"' in found.stdout


def test_a_changed_language_option_is_found(contract: Path) -> None:
    edit(contract / "proto/steer/v1/info.proto", r'^option java_package = ".*";$', 'option java_package = "org.steer";')

    found = breaking_changes(contract)

    assert found.returncode != 0
    assert '"java_package" changed' in found.stdout


def test_a_read_that_is_no_longer_marked_as_one_is_found(contract: Path) -> None:
    marked = r"rpc GetModel\((.*)\) \{\n    option idempotency_level = NO_SIDE_EFFECTS;\n  \}"
    edit(contract / "proto/steer/v1/info.proto", marked, r"rpc GetModel(\1);")

    found = breaking_changes(contract)

    assert found.returncode != 0
    assert 'RPC "GetModel" on service "InfoService" changed option "idempotency_level"' in found.stdout


def test_a_changed_comment_breaks_nothing(contract: Path) -> None:
    edit(contract / "proto/steer/v1/tensor.proto", r"^// A dense array: .*$", "// Other words.")

    assert breaking_changes(contract).returncode == 0


def test_make_help_lists_the_target_that_renews_the_baseline() -> None:
    command = ["make", "--no-print-directory", "help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout

    assert re.search(r"^proto-baseline +\S", told, flags=re.MULTILINE)
