"""Tokens in a volume as Kubernetes makes it: files are links through a link to a folder, which alone is replaced."""

import hashlib
import os
from pathlib import Path

from steer_service.server.tokens import TokenFile


def entry(token: str) -> str:
    return f'[clients.alice]\nsha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]\n'


def publish(volume: Path, version: str, text: str) -> None:
    """Writes a new version beside the old one and switches to it in one step, as the kubelet does."""
    (volume / version).mkdir()
    (volume / version / "tokens.toml").write_text(text)
    (volume / "..data_tmp").symlink_to(version)
    os.replace(volume / "..data_tmp", volume / "..data")


def test_a_new_version_of_a_secret_is_read(tmp_path: Path) -> None:
    publish(tmp_path, "..1", entry("first"))
    (tmp_path / "tokens.toml").symlink_to("..data/tokens.toml")
    tokens = TokenFile(str(tmp_path / "tokens.toml"))
    assert tokens.client_of(b"first") is not None

    publish(tmp_path, "..2", entry("second"))
    tokens.refresh()
    assert tokens.client_of(b"second") is not None
    assert tokens.client_of(b"first") is None
