"""The committed stubs are those of the proto files."""

from pathlib import Path

import pytest

from steer_service.wire import regenerate

pytest.importorskip("grpc_tools", reason="stubs are made with grpcio-tools, of the dev extra")


def test_the_committed_stubs_are_up_to_date(tmp_path: Path):
    regenerate.generate(tmp_path)
    assert regenerate.differences(tmp_path) == []


def test_a_stub_that_differs_is_named(tmp_path: Path):
    regenerate.generate(tmp_path)
    (tmp_path / "info_pb2.py").write_text("")
    assert regenerate.differences(tmp_path) == ["info_pb2.py"]
