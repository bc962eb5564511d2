"""CaptureSpec and CaptureSite <-> messages."""

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.wire import capture_pb2
from steer_service.wire.fields import not_built

_SITE_TO_PROTO = {
    CaptureSite.AFTER: capture_pb2.CAPTURE_SITE_AFTER,
    CaptureSite.BEFORE: capture_pb2.CAPTURE_SITE_BEFORE,
}
_SITE_FROM_PROTO: dict[int, CaptureSite] = {number: site for site, number in _SITE_TO_PROTO.items()}


def site_to_proto(site: CaptureSite) -> capture_pb2.CaptureSite:
    """The wire's number for `site`."""
    return _SITE_TO_PROTO[site]


def site_from_proto(number: int) -> CaptureSite | None:
    """The site of a captured block; None for one that this version does not know."""
    return _SITE_FROM_PROTO.get(number)


def capture_to_proto(spec: CaptureSpec) -> capture_pb2.CaptureSpec:
    """`spec` as a message."""
    return capture_pb2.CaptureSpec(
        layers=spec.layers,
        site=site_to_proto(spec.site),
        max_chunk_bytes=spec.max_chunk_bytes,
    )


def capture_from_proto(message: capture_pb2.CaptureSpec) -> CaptureSpec:
    """The spec of a message; raises InvalidRequest, or Unsupported for what is not built yet."""
    _refuse_what_is_not_built(message)
    return CaptureSpec(
        layers=tuple(message.layers),
        max_chunk_bytes=message.max_chunk_bytes if message.HasField("max_chunk_bytes") else None,
    )


def _refuse_what_is_not_built(message: capture_pb2.CaptureSpec) -> None:
    if message.site not in (capture_pb2.CAPTURE_SITE_UNSPECIFIED, capture_pb2.CAPTURE_SITE_AFTER):
        raise not_built("capture before steering", "site")
    if message.HasField("positions"):
        raise not_built("capture of selected positions", "positions")
    if message.dtype != 0:
        raise not_built("capture in a chosen dtype", "dtype")
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
