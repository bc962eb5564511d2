"""CaptureSpec, CaptureSite and labels of rows <-> messages."""

from collections.abc import Iterator

import numpy as np

from steer_service.core.capture import CaptureSite, CaptureSpec, RowLabels
from steer_service.core.errors import Unsupported, within
from steer_service.core.request import CaptureLabels
from steer_service.wire import capture_pb2, tensor_pb2
from steer_service.wire.fields import bad_stream, not_built
from steer_service.wire.positions import scope_from_proto, scope_to_proto
from steer_service.wire.tensors import dtype_from_proto, dtype_to_proto

MAX_LABELS = 64 * 1024
"""Rows labelled by one message; keeps it far below the 4 MiB that any gRPC client accepts."""

_SITE_TO_PROTO = {
    CaptureSite.AFTER: capture_pb2.CAPTURE_SITE_AFTER,
    CaptureSite.BEFORE: capture_pb2.CAPTURE_SITE_BEFORE,
    CaptureSite.BOTH: capture_pb2.CAPTURE_SITE_BOTH,
}
_SITE_FROM_PROTO: dict[int, CaptureSite] = {number: site for site, number in _SITE_TO_PROTO.items()}
_SITE_ASKED = {capture_pb2.CAPTURE_SITE_UNSPECIFIED: CaptureSite.AFTER, **_SITE_FROM_PROTO}


def site_to_proto(site: CaptureSite) -> capture_pb2.CaptureSite:
    """The wire's number for `site`."""
    return _SITE_TO_PROTO[site]


def site_from_proto(number: int) -> CaptureSite | None:
    """The site of a captured block; None for one that no block has, or that this version does not know."""
    site = _SITE_FROM_PROTO.get(number)
    return None if site is CaptureSite.BOTH else site


def capture_to_proto(spec: CaptureSpec) -> capture_pb2.CaptureSpec:
    """`spec` as a message."""
    return capture_pb2.CaptureSpec(
        layers=spec.layers,
        site=site_to_proto(spec.site),
        positions=scope_to_proto(spec.positions),
        dtype=dtype_to_proto(spec.dtype) if spec.dtype is not None else tensor_pb2.DTYPE_UNSPECIFIED,
        max_chunk_bytes=spec.max_chunk_bytes,
    )


def capture_from_proto(message: capture_pb2.CaptureSpec) -> CaptureSpec:
    """The spec of a message; raises InvalidRequest, or Unsupported for what is not built yet."""
    _refuse_what_is_not_built(message)
    if message.site not in _SITE_ASKED:
        raise Unsupported(f"the site {message.site} is not known here", reason="UNKNOWN_SITE", field="site")
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
    )


def labels_to_proto(event: CaptureLabels) -> Iterator[capture_pb2.CaptureLabels]:
    """The messages of `event`, each of at most MAX_LABELS rows; one where there are no rows."""
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
    """The labels of a message; raises EngineFailed (BAD_STREAM) unless they are parallel lists of int32."""
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


def _refuse_what_is_not_built(message: capture_pb2.CaptureSpec) -> None:
    if message.delivery not in (
        capture_pb2.CAPTURE_DELIVERY_UNSPECIFIED,
        capture_pb2.CAPTURE_DELIVERY_INLINE,
    ):
        raise not_built("any delivery but inline", "delivery")
    if message.timing not in (
        capture_pb2.CAPTURE_TIMING_UNSPECIFIED,
        capture_pb2.CAPTURE_TIMING_AFTER_FINISH,
    ):
        raise not_built("live capture", "timing")
    if message.shared_memory_session:
        raise not_built("capture through shared memory", "shared_memory_session")
