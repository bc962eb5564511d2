"""CaptureSpec, its enums, row labels and boundaries of messages <-> messages."""

from collections.abc import Iterable, Iterator

import numpy as np

from steer_service.core.capture import (
    CaptureDelivery,
    CaptureSite,
    CaptureSpec,
    MessageBoundary,
    Pooling,
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.errors import Unsupported, within
from steer_service.core.events import CaptureLabels
from steer_service.wire import capture_pb2, generation_pb2, tensor_pb2
from steer_service.wire.fields import bad_stream
from steer_service.wire.hook_points import hook_from_proto, hook_to_proto
from steer_service.wire.positions import scope_from_proto, scope_to_proto
from steer_service.wire.tensors import dtype_from_proto, dtype_to_proto

MAX_LABELS = 64 * 1024
"""Rows in one message of labels at most; keeps it far below the 4 MiB that any gRPC client accepts."""

_SITE_TO_PROTO = {
    CaptureSite.AFTER: capture_pb2.CAPTURE_SITE_AFTER,
    CaptureSite.BEFORE: capture_pb2.CAPTURE_SITE_BEFORE,
    CaptureSite.BOTH: capture_pb2.CAPTURE_SITE_BOTH,
}
_SITE_FROM_PROTO: dict[int, CaptureSite] = {number: site for site, number in _SITE_TO_PROTO.items()}
_SITE_ASKED = {capture_pb2.CAPTURE_SITE_UNSPECIFIED: CaptureSite.AFTER, **_SITE_FROM_PROTO}

_DELIVERY_TO_PROTO = {
    CaptureDelivery.INLINE: capture_pb2.CAPTURE_DELIVERY_INLINE,
    CaptureDelivery.HELD: capture_pb2.CAPTURE_DELIVERY_HELD,
    CaptureDelivery.SHARED_MEMORY_PREFERRED: capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED,
    CaptureDelivery.SHARED_MEMORY_REQUIRED: capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED,
}
_DELIVERY_FROM_PROTO: dict[int, CaptureDelivery] = {number: one for one, number in _DELIVERY_TO_PROTO.items()}
_DELIVERY_ASKED = {capture_pb2.CAPTURE_DELIVERY_UNSPECIFIED: CaptureDelivery.INLINE, **_DELIVERY_FROM_PROTO}

_POOLING_TO_PROTO = {
    Pooling.NONE: capture_pb2.POOLING_UNSPECIFIED,
    Pooling.MEAN: capture_pb2.POOLING_MEAN,
    Pooling.LAST: capture_pb2.POOLING_LAST,
    Pooling.MAX: capture_pb2.POOLING_MAX,
}
_POOLING_FROM_PROTO: dict[int, Pooling] = {number: one for one, number in _POOLING_TO_PROTO.items()}

_IS_LIVE: dict[int, bool] = {
    capture_pb2.CAPTURE_TIMING_UNSPECIFIED: False,
    capture_pb2.CAPTURE_TIMING_AFTER_FINISH: False,
    capture_pb2.CAPTURE_TIMING_LIVE: True,
}

_FALLBACK_TO_PROTO = {
    SharedMemoryFallback.NO_SESSION: capture_pb2.SHARED_MEMORY_FALLBACK_NO_SESSION,
    SharedMemoryFallback.SESSION_ENDED: capture_pb2.SHARED_MEMORY_FALLBACK_SESSION_ENDED,
    SharedMemoryFallback.SWITCHED_OFF: capture_pb2.SHARED_MEMORY_FALLBACK_SWITCHED_OFF,
    SharedMemoryFallback.OTHER_INSTANCE: capture_pb2.SHARED_MEMORY_FALLBACK_OTHER_INSTANCE,
}
_FALLBACK_FROM_PROTO: dict[int, SharedMemoryFallback] = {number: one for one, number in _FALLBACK_TO_PROTO.items()}


def site_to_proto(site: CaptureSite) -> capture_pb2.CaptureSite:
    """`site` as its enum number."""
    return _SITE_TO_PROTO[site]


def site_from_proto(number: int) -> CaptureSite | None:
    """The site of a captured block; None for BOTH, which no block has, and for numbers that are not known."""
    site = _SITE_FROM_PROTO.get(number)
    return None if site is CaptureSite.BOTH else site


def sites_from_proto(number: int) -> tuple[CaptureSite, ...] | None:
    """The sites of held rows; None for a number that is not known."""
    site = _SITE_FROM_PROTO.get(number)
    return None if site is None else site.parts


def pooling_to_proto(pooling: Pooling) -> capture_pb2.Pooling:
    """`pooling` as its enum number."""
    return _POOLING_TO_PROTO[pooling]


def pooling_from_proto(number: int) -> Pooling | None:
    """The pooling of captured rows; None for a number that is not known."""
    return _POOLING_FROM_PROTO.get(number)


def capture_to_proto(spec: CaptureSpec) -> capture_pb2.CaptureSpec:
    """`spec` as a message."""
    return capture_pb2.CaptureSpec(
        layers=spec.layers,
        site=site_to_proto(spec.site),
        positions=scope_to_proto(spec.positions),
        dtype=dtype_to_proto(spec.dtype) if spec.dtype is not None else tensor_pb2.DTYPE_UNSPECIFIED,
        max_chunk_bytes=spec.max_chunk_bytes,
        delivery=delivery_to_proto(spec.delivery),
        timing=capture_pb2.CAPTURE_TIMING_LIVE if spec.is_live else capture_pb2.CAPTURE_TIMING_AFTER_FINISH,
        shared_memory_session=spec.shared_memory_session,
        release_token=spec.release_token,
        hook=hook_to_proto(spec.hook),
        pooling=pooling_to_proto(spec.pooling),
    )


def capture_from_proto(message: capture_pb2.CaptureSpec) -> CaptureSpec:
    """The spec in a message; raises InvalidRequest, or Unsupported for enum numbers that are not known."""
    if message.site not in _SITE_ASKED:
        raise Unsupported(f"the site {message.site} is not known to this server", reason="UNKNOWN_SITE", field="site")
    if message.delivery not in _DELIVERY_ASKED:
        raise Unsupported(
            f"the delivery {message.delivery} is not known to this server", reason="UNKNOWN_DELIVERY", field="delivery"
        )
    if message.timing not in _IS_LIVE:
        raise Unsupported(
            f"the timing {message.timing} is not known to this server", reason="UNKNOWN_TIMING", field="timing"
        )
    pooling = pooling_from_proto(message.pooling)
    if pooling is None:
        raise Unsupported(
            f"the pooling {message.pooling} is not known to this server", reason="UNKNOWN_POOLING", field="pooling"
        )
    with within("positions"):
        positions = scope_from_proto(message.positions) if message.HasField("positions") else None
    with within("dtype"):
        dtype = dtype_from_proto(message.dtype) if message.dtype != tensor_pb2.DTYPE_UNSPECIFIED else None
    return CaptureSpec(
        layers=tuple(message.layers),
        site=_SITE_ASKED[message.site],
        positions=positions,
        dtype=dtype,
        max_chunk_bytes=message.max_chunk_bytes if message.HasField("max_chunk_bytes") else None,
        delivery=_DELIVERY_ASKED[message.delivery],
        is_live=_IS_LIVE[message.timing],
        shared_memory_session=message.shared_memory_session,
        release_token=message.release_token,
        hook=hook_from_proto(message.hook),
        pooling=pooling,
    )


def delivery_to_proto(delivery: CaptureDelivery | None) -> capture_pb2.CaptureDelivery:
    """`delivery` as its enum number; UNSPECIFIED for None."""
    return capture_pb2.CAPTURE_DELIVERY_UNSPECIFIED if delivery is None else _DELIVERY_TO_PROTO[delivery]


def delivery_from_proto(number: int) -> CaptureDelivery | None:
    """The delivery of an enum number; None for UNSPECIFIED and for numbers that are not known."""
    return _DELIVERY_FROM_PROTO.get(number)


def fallback_to_proto(fallback: SharedMemoryFallback | None) -> capture_pb2.SharedMemoryFallback:
    """`fallback` as its enum number; UNSPECIFIED for None."""
    return capture_pb2.SHARED_MEMORY_FALLBACK_UNSPECIFIED if fallback is None else _FALLBACK_TO_PROTO[fallback]


def fallback_from_proto(number: int) -> SharedMemoryFallback | None:
    """The fallback of an enum number; None for UNSPECIFIED.

    Raises EngineFailed (BAD_STREAM) for numbers that are not known: None would mean that shared memory is used.
    """
    if number == capture_pb2.SHARED_MEMORY_FALLBACK_UNSPECIFIED:
        return None
    if number not in _FALLBACK_FROM_PROTO:
        raise bad_stream(f"shared memory is not used for the unknown reason {number}")
    return _FALLBACK_FROM_PROTO[number]


def labels_to_proto(event: CaptureLabels) -> Iterator[capture_pb2.CaptureLabels]:
    """The messages of `event`, each of at most MAX_LABELS rows; one message if there are no rows."""
    for start in range(0, max(len(event.labels), 1), MAX_LABELS):
        part = event.labels[start : start + MAX_LABELS]
        yield capture_pb2.CaptureLabels(
            output_index=event.output_index,
            positions=part.positions.tolist(),
            token_ids=part.token_ids.tolist(),
            is_generated=part.is_generated.tolist(),
            is_steered=part.is_steered.tolist(),
        )


def labels_from_proto(message: capture_pb2.CaptureLabels) -> CaptureLabels:
    """The labels in a message; raises EngineFailed (BAD_STREAM) unless they are parallel lists of int32."""
    numbers = [np.array(values, dtype=np.uint32) for values in (message.positions, message.token_ids)]
    flags = [np.array(values, dtype=np.bool_) for values in (message.is_generated, message.is_steered)]
    if len({len(column) for column in (*numbers, *flags)}) > 1:
        raise bad_stream("the labels of captured rows are not parallel lists")
    if any(column.max(initial=0) > np.iinfo(np.int32).max for column in numbers):
        raise bad_stream("a label of a captured row is too large")
    positions, token_ids = (column.astype(np.int32) for column in numbers)
    is_generated, is_steered = flags
    labels = RowLabels(positions=positions, token_ids=token_ids, is_generated=is_generated, is_steered=is_steered)
    return CaptureLabels(output_index=message.output_index, labels=labels)


def boundaries_to_proto(boundaries: Iterable[MessageBoundary]) -> list[generation_pb2.MessageBoundary]:
    """The positions of chat messages as messages."""
    return [
        generation_pb2.MessageBoundary(
            role=boundary.role,
            content=boundary.content,
            start_token=boundary.start_token,
            end_token=boundary.end_token,
        )
        for boundary in boundaries
    ]


def boundaries_from_proto(messages: Iterable[generation_pb2.MessageBoundary]) -> tuple[MessageBoundary, ...]:
    """The positions of chat messages in messages."""
    return tuple(
        MessageBoundary(message.role, message.content, message.start_token, message.end_token) for message in messages
    )
