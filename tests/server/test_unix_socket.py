"""Unix sockets: who may call, and whose share the callers take."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.server.app import SteerServer
from steer_service.server.bind import SocketPermissions
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from tests.server.served import Serve, bounded, text_request
from tests.server.test_tokens import entry

STRANGER = 65534
"""A user and a group that this process is not."""


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user or use any group")


@pytest.mark.parametrize(
    ("mode", "group"), [("600", ""), pytest.param("660", str(STRANGER), marks=as_root), ("666", "")]
)
async def test_a_socket_has_the_permissions_that_are_set(serve: Serve, tmp_path: Path, mode: str, group: str) -> None:
    path = tmp_path / "steer.sock"
    before = os.umask(0)
    try:
        await serve(address=f"unix:{path}", uds_mode=mode, uds_group=group)
        assert os.umask(0) == 0  # the umask of the process is as it was
    finally:
        os.umask(before)
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == int(mode, 8)
    if group:
        assert status.st_gid == STRANGER


CALL = """
import os, socket, sys
os.setgroups([int(sys.argv[2])]) if sys.argv[2] else os.setgroups([])
os.setgid(65533); os.setuid(65533)
socket.socket(socket.AF_UNIX).connect(sys.argv[1])
"""


@as_root
@pytest.mark.parametrize(
    ("mode", "groups", "may"), [("600", "", False), ("660", "", False), ("660", str(STRANGER), True), ("666", "", True)]
)
async def test_other_users_call_only_if_the_permissions_let_them(
    serve: Serve, tmp_path: Path, mode: str, groups: str, may: bool
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    for part in (folder, *folder.parents):
        if part.owner() == "root" and not part.stat().st_mode & stat.S_IXOTH and part != Path("/"):
            part.chmod(part.stat().st_mode | stat.S_IXOTH)
    path = folder / "steer.sock"
    await serve(address=f"unix:{path}", uds_mode=mode, uds_group=str(STRANGER))
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/env", "python3", "-c", CALL, str(path), groups, stderr=asyncio.subprocess.PIPE
    )
    _, err = await bounded(process.communicate())
    assert (process.returncode == 0) is may, err
    assert may or b"PermissionError" in err


async def test_all_callers_of_a_socket_have_one_share(serve: Serve, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("alice", "alices"))
    backend = FakeBackend()
    served = await serve(backend, address=f"unix:{tmp_path / 'steer.sock'}")
    for name in ("one", "two"):
        call = served.generation.Generate(text_request(), metadata=(("steer-client-id", name),))
        assert [response async for response in call]
    assert [request.client_id for request in backend.requests[-2:]] == ["unix socket"] * 2
    with_tokens = await serve(backend, address=f"unix:{tmp_path / 'other.sock'}", token_file=str(tokens))
    call = with_tokens.generation.Generate(text_request(), metadata=(("authorization", "Bearer alices"),))
    assert [response async for response in call]
    assert backend.requests[-1].client_id == "identity alice"


async def test_a_folder_where_others_may_replace_the_socket_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    server = SteerServer(ServerConfig(address=f"unix:{folder / 'steer.sock'}"))
    with pytest.raises(InvalidRequest, match="other users of this machine may replace the socket") as raised:
        await server.listen()
    assert raised.value.reason == "EXPOSED"
    folder.chmod(0o1777)  # as /tmp: only its owner may
    server = SteerServer(ServerConfig(address=f"unix:{folder / 'steer.sock'}"))
    await server.listen()
    server.stop_now()
    await bounded(server.drain())


def test_the_permissions_of_other_addresses_are_not_touched() -> None:
    before = os.umask(0o022)
    try:
        with SocketPermissions(mode=0o600).applied("127.0.0.1:0"), socket.socket():
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
