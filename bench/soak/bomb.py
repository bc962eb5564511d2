"""A gRPC call over a hand-made HTTP/2 connection, with a compressed message that Python's client would not send."""

import asyncio
import gzip
import struct
import time

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FRAME_BYTES = 16_384


def compressed_zeros(size: int) -> bytes:
    """A gRPC message of `size` zeros, compressed with gzip to about a thousandth."""
    zeros = gzip.compress(bytes(size), 9)
    return b"\x01" + struct.pack(">I", len(zeros)) + zeros


async def refused_after(address: str, path: str, message: bytes) -> float:
    """Seconds from the last byte sent until the server has ended the call; raises TimeoutError after 30 s."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", address.encode()),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"grpc-encoding", b"gzip"),
    ]
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)
    writer.write(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, b"") + _frame(HEADERS, END_HEADERS, 1, block)
    )
    windows, sent = {0: 65_535, 1: 65_535}, 0
    sent_at = 0.0
    async with asyncio.timeout(30):
        while True:
            while sent < len(message) and min(windows.values()) > 0:
                size = min(FRAME_BYTES, len(message) - sent, *windows.values())
                last = sent + size == len(message)
                writer.write(_frame(DATA, END_STREAM if last else 0, 1, message[sent : sent + size]))
                sent += size
                windows = {stream: window - size for stream, window in windows.items()}
                sent_at = time.perf_counter()
            await writer.drain()
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3]))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:]) & 0x7FFFFFFF
            if kind == SETTINGS and not flags & ACK:
                for number, value in struct.iter_unpack(">HI", payload):
                    if number == 4:  # the initial window of a stream
                        windows[1] += value - 65_535
                writer.write(_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                writer.write(_frame(PING, ACK, 0, payload))
            elif kind == WINDOW_UPDATE:
                windows[stream] = windows.get(stream, 0) + int.from_bytes(payload)
            elif kind in (RST_STREAM, GOAWAY) or (kind in (HEADERS, DATA) and stream == 1 and flags & END_STREAM):
                writer.close()
                return time.perf_counter() - sent_at


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _text(text: bytes) -> bytes:
    """A string of HPACK without compression."""
    assert len(text) < 127
    return bytes([len(text)]) + text
