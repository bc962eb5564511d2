from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class HookPoint(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOOK_POINT_UNSPECIFIED: _ClassVar[HookPoint]
    HOOK_POINT_RESIDUAL_STREAM: _ClassVar[HookPoint]
HOOK_POINT_UNSPECIFIED: HookPoint
HOOK_POINT_RESIDUAL_STREAM: HookPoint
