"""HookPoint <-> its enum number."""

from steer_service.core.errors import Unsupported
from steer_service.core.hook_point import HookPoint
from steer_service.wire import hook_point_pb2

_TO_PROTO: dict[HookPoint, hook_point_pb2.HookPoint] = {
    HookPoint.RESIDUAL_STREAM: hook_point_pb2.HOOK_POINT_RESIDUAL_STREAM,
}
_FROM_PROTO: dict[int, HookPoint] = {
    hook_point_pb2.HOOK_POINT_UNSPECIFIED: HookPoint.RESIDUAL_STREAM,
    **{number: hook for hook, number in _TO_PROTO.items()},
}


def hook_to_proto(hook: HookPoint) -> hook_point_pb2.HookPoint:
    """`hook` as its enum number."""
    return _TO_PROTO[hook]


def hook_from_proto(number: int) -> HookPoint:
    """The hook point of an enum number; raises Unsupported, with the field `hook`, for numbers that are not known."""
    if number not in _FROM_PROTO:
        raise Unsupported(
            f"the hook point {number} is not known to this server", reason="UNKNOWN_HOOK_POINT", field="hook"
        )
    return _FROM_PROTO[number]
