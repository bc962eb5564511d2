"""A file is replaced as a whole or stays as it was."""

from pathlib import Path

import pytest

from steer_service.formats.atomic_write import atomic_write


def test_the_file_is_replaced_at_the_end(tmp_path: Path):
    (tmp_path / "x").write_text("before")
    with atomic_write(tmp_path / "x") as part:
        part.write_text("after")
        assert (tmp_path / "x").read_text() == "before"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "after")]


def test_what_fails_on_the_way_changes_nothing_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(UnicodeEncodeError), atomic_write(tmp_path / "x") as part:
        part.write_text("half \ud800", encoding="utf-8")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "before")]
