"""Legal-looking messages of 16 MiB with millions of entries in one repeated field each."""

from steer_service.wire.generation_pb2 import GenerateRequest

SIZE = (16 << 20) - 64

ENTRIES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    # bytes of one entry, the numbers of the fields that it is in, from outside
    "capture.layers": (b"\x08\x01", (8,)),
    "capture.positions.ranges": (b"\x1a\x00", (8, 3)),
    "chat.messages": (b"\x0a\x00", (5,)),
    "steering.layers": (b"\x0a\x00", (7,)),
    "steering.layers.operations": (b"\x12\x00", (7, 1)),
    "steering.layers.operations.add.vector.inline.shape": (b"\x10\x01", (7, 1, 2, 1, 1, 1)),
    "token_ids.ids": (b"\x08\x01", (4,)),
    "sampling.stop": (b"\x7a\x00", (6,)),
    "sampling.stop_token_ids": (b"\x80\x01\x01", (6,)),
    "sampling.logit_bias": (b"\x92\x01\x00", (6,)),
    "an unknown field": (b"\x9a\x06\x00", ()),
}


def message(field: str) -> bytes:
    """A message of about 16 MiB that repeats one field."""
    entry, path = ENTRIES[field]
    data = entry * ((SIZE - 16 * len(path)) // len(entry))
    for number in reversed(path):
        data = bytes([number << 3 | 2]) + _varint(len(data)) + data
    return data


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def serialized(request: GenerateRequest | bytes) -> bytes:
    """A serializer for stubs that also send bytes as they are."""
    return request if isinstance(request, bytes) else request.SerializeToString()
