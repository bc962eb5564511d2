"""What is steered or captured at a decoder layer."""

import enum
from typing import Any

from steer_service.core.errors import Unsupported


class HookPoint(enum.Enum):
    """What operations act on, or a capture reads, at a decoder layer; today there is one."""

    RESIDUAL_STREAM = "residual_stream"
    """The residual stream after the layer."""


def hook_point(value: Any) -> HookPoint:
    """`value`, or the hook point that it names; raises Unsupported, with the field `hook`, for any other."""
    try:
        return HookPoint(value)
    except ValueError:
        known = ", ".join(repr(hook.value) for hook in HookPoint)
        raise Unsupported(
            f"the hook point {value!r} is not one of {known}", reason="UNKNOWN_HOOK_POINT", field="hook"
        ) from None
