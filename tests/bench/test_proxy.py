"""The proxy of the soak really does to connections what it says."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from bench.soak.proxy import Proxy, proxy_to

BOUND_S = 10.0


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1024):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    async with proxy_to("127.0.0.1:" + str(server.sockets[0].getsockname()[1])) as proxy:
        yield proxy
    server.close()


class Connection:
    """A connection through the proxy."""

    @classmethod
    async def to(cls, proxy: Proxy) -> "Connection":
        self = cls()
        host, port = proxy.address.rsplit(":", 1)
        self.reader, self.writer = await asyncio.open_connection(host, int(port))
        assert await self.answer() == b"hello"
        return self

    async def answer(self) -> bytes:
        self.writer.write(b"hello")
        async with asyncio.timeout(BOUND_S):
            return await self.reader.readexactly(5)


async def test_it_forwards_and_delays(proxy: Proxy):
    connection = await Connection.to(proxy)
    proxy.delay_s = 0.05
    began = asyncio.get_running_loop().time()
    assert await connection.answer() == b"hello"
    assert asyncio.get_running_loop().time() - began >= 0.1  # there and back
    connection.writer.close()


async def test_a_reset_ends_connections_with_an_error_and_new_ones_work(proxy: Proxy):
    connection = await Connection.to(proxy)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(connection.reader.read(), BOUND_S)
    connection.writer.close()
    (await Connection.to(proxy)).writer.close()


async def test_a_connection_is_cut_after_a_number_of_bytes(proxy: Proxy):
    connection = await Connection.to(proxy)
    proxy.cut_after_bytes = 7
    assert await connection.answer() == b"hello"
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await connection.answer()
    connection.writer.close()


async def test_bytes_that_were_kept_back_arrive_later(proxy: Proxy):
    connection = await Connection.to(proxy)
    proxy.stop_forwarding()
    answer = asyncio.ensure_future(connection.answer())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not answer.done()
    proxy.forward_again()
    assert await answer == b"hello"
    connection.writer.close()
