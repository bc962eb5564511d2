import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from steer_service.wire import hook_point_pb2 as _hook_point_pb2
from steer_service.wire import position_pb2 as _position_pb2
from steer_service.wire import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_UNSPECIFIED: _ClassVar[Pooling]
    POOLING_MEAN: _ClassVar[Pooling]
    POOLING_LAST: _ClassVar[Pooling]
    POOLING_MAX: _ClassVar[Pooling]

class CaptureSite(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPTURE_SITE_UNSPECIFIED: _ClassVar[CaptureSite]
    CAPTURE_SITE_AFTER: _ClassVar[CaptureSite]
    CAPTURE_SITE_BEFORE: _ClassVar[CaptureSite]
    CAPTURE_SITE_BOTH: _ClassVar[CaptureSite]

class CaptureDelivery(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPTURE_DELIVERY_UNSPECIFIED: _ClassVar[CaptureDelivery]
    CAPTURE_DELIVERY_INLINE: _ClassVar[CaptureDelivery]
    CAPTURE_DELIVERY_HELD: _ClassVar[CaptureDelivery]
    CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED: _ClassVar[CaptureDelivery]
    CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED: _ClassVar[CaptureDelivery]

class SharedMemoryFallback(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARED_MEMORY_FALLBACK_UNSPECIFIED: _ClassVar[SharedMemoryFallback]
    SHARED_MEMORY_FALLBACK_NO_SESSION: _ClassVar[SharedMemoryFallback]
    SHARED_MEMORY_FALLBACK_SESSION_ENDED: _ClassVar[SharedMemoryFallback]
    SHARED_MEMORY_FALLBACK_SWITCHED_OFF: _ClassVar[SharedMemoryFallback]
    SHARED_MEMORY_FALLBACK_OTHER_INSTANCE: _ClassVar[SharedMemoryFallback]

class CaptureTiming(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPTURE_TIMING_UNSPECIFIED: _ClassVar[CaptureTiming]
    CAPTURE_TIMING_AFTER_FINISH: _ClassVar[CaptureTiming]
    CAPTURE_TIMING_LIVE: _ClassVar[CaptureTiming]
POOLING_UNSPECIFIED: Pooling
POOLING_MEAN: Pooling
POOLING_LAST: Pooling
POOLING_MAX: Pooling
CAPTURE_SITE_UNSPECIFIED: CaptureSite
CAPTURE_SITE_AFTER: CaptureSite
CAPTURE_SITE_BEFORE: CaptureSite
CAPTURE_SITE_BOTH: CaptureSite
CAPTURE_DELIVERY_UNSPECIFIED: CaptureDelivery
CAPTURE_DELIVERY_INLINE: CaptureDelivery
CAPTURE_DELIVERY_HELD: CaptureDelivery
CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED: CaptureDelivery
CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED: CaptureDelivery
SHARED_MEMORY_FALLBACK_UNSPECIFIED: SharedMemoryFallback
SHARED_MEMORY_FALLBACK_NO_SESSION: SharedMemoryFallback
SHARED_MEMORY_FALLBACK_SESSION_ENDED: SharedMemoryFallback
SHARED_MEMORY_FALLBACK_SWITCHED_OFF: SharedMemoryFallback
SHARED_MEMORY_FALLBACK_OTHER_INSTANCE: SharedMemoryFallback
CAPTURE_TIMING_UNSPECIFIED: CaptureTiming
CAPTURE_TIMING_AFTER_FINISH: CaptureTiming
CAPTURE_TIMING_LIVE: CaptureTiming

class FetchCaptureRequest(_message.Message):
    __slots__ = ("capture_id", "layers", "positions", "max_chunk_bytes", "skip_bytes")
    CAPTURE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SKIP_BYTES_FIELD_NUMBER: _ClassVar[int]
    capture_id: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    positions: _position_pb2.PositionScope
    max_chunk_bytes: int
    skip_bytes: int
    def __init__(self, capture_id: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., positions: _Optional[_Union[_position_pb2.PositionScope, _Mapping]] = ..., max_chunk_bytes: _Optional[int] = ..., skip_bytes: _Optional[int] = ...) -> None: ...

class FetchCaptureResponse(_message.Message):
    __slots__ = ("sequence", "capture_chunk")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    capture_chunk: CaptureChunk
    def __init__(self, sequence: _Optional[int] = ..., capture_chunk: _Optional[_Union[CaptureChunk, _Mapping]] = ...) -> None: ...

class ReleaseCaptureRequest(_message.Message):
    __slots__ = ("capture_id", "lease_token", "release_token")
    CAPTURE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    capture_id: str
    lease_token: bytes
    release_token: bytes
    def __init__(self, capture_id: _Optional[str] = ..., lease_token: _Optional[bytes] = ..., release_token: _Optional[bytes] = ...) -> None: ...

class ReleaseCaptureResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: bool
    def __init__(self, released: bool = ...) -> None: ...

class OpenSharedMemoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenSharedMemoryResponse(_message.Message):
    __slots__ = ("challenge_token", "segment_name", "expires_at", "expires_in", "instance")
    CHALLENGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_NAME_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    challenge_token: bytes
    segment_name: str
    expires_at: _timestamp_pb2.Timestamp
    expires_in: _duration_pb2.Duration
    instance: str
    def __init__(self, challenge_token: _Optional[bytes] = ..., segment_name: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_in: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., instance: _Optional[str] = ...) -> None: ...

class ConfirmSharedMemoryRequest(_message.Message):
    __slots__ = ("challenge_token", "nonce")
    CHALLENGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    challenge_token: bytes
    nonce: bytes
    def __init__(self, challenge_token: _Optional[bytes] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class ConfirmSharedMemoryResponse(_message.Message):
    __slots__ = ("session_token",)
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    def __init__(self, session_token: _Optional[bytes] = ...) -> None: ...

class CaptureSpec(_message.Message):
    __slots__ = ("layers", "site", "positions", "dtype", "delivery", "timing", "max_chunk_bytes", "shared_memory_session", "release_token", "hook", "pooling")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_SESSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HOOK_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    site: CaptureSite
    positions: _position_pb2.PositionScope
    dtype: _tensor_pb2.Dtype
    delivery: CaptureDelivery
    timing: CaptureTiming
    max_chunk_bytes: int
    shared_memory_session: bytes
    release_token: bytes
    hook: _hook_point_pb2.HookPoint
    pooling: Pooling
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., site: _Optional[_Union[CaptureSite, str]] = ..., positions: _Optional[_Union[_position_pb2.PositionScope, _Mapping]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., delivery: _Optional[_Union[CaptureDelivery, str]] = ..., timing: _Optional[_Union[CaptureTiming, str]] = ..., max_chunk_bytes: _Optional[int] = ..., shared_memory_session: _Optional[bytes] = ..., release_token: _Optional[bytes] = ..., hook: _Optional[_Union[_hook_point_pb2.HookPoint, str]] = ..., pooling: _Optional[_Union[Pooling, str]] = ...) -> None: ...

class CaptureLabels(_message.Message):
    __slots__ = ("output_index", "positions", "token_ids", "is_generated", "is_steered")
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_GENERATED_FIELD_NUMBER: _ClassVar[int]
    IS_STEERED_FIELD_NUMBER: _ClassVar[int]
    output_index: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    is_generated: _containers.RepeatedScalarFieldContainer[bool]
    is_steered: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, output_index: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., is_generated: _Optional[_Iterable[bool]] = ..., is_steered: _Optional[_Iterable[bool]] = ...) -> None: ...

class CaptureHeader(_message.Message):
    __slots__ = ("output_index", "layer", "site", "dtype", "shape", "spans", "total_bytes", "pooling")
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    output_index: int
    layer: int
    site: CaptureSite
    dtype: _tensor_pb2.Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    spans: _containers.RepeatedCompositeFieldContainer[_position_pb2.RowSpan]
    total_bytes: int
    pooling: Pooling
    def __init__(self, output_index: _Optional[int] = ..., layer: _Optional[int] = ..., site: _Optional[_Union[CaptureSite, str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., spans: _Optional[_Iterable[_Union[_position_pb2.RowSpan, _Mapping]]] = ..., total_bytes: _Optional[int] = ..., pooling: _Optional[_Union[Pooling, str]] = ...) -> None: ...

class CaptureChunk(_message.Message):
    __slots__ = ("capture", "offset", "header", "crc32c", "data")
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    capture: int
    offset: int
    header: CaptureHeader
    crc32c: int
    data: bytes
    def __init__(self, capture: _Optional[int] = ..., offset: _Optional[int] = ..., header: _Optional[_Union[CaptureHeader, _Mapping]] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class SharedMemoryRegion(_message.Message):
    __slots__ = ("capture", "header", "lease_token", "segment_name", "offset", "expires_at", "expires_in")
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_FIELD_NUMBER: _ClassVar[int]
    capture: int
    header: CaptureHeader
    lease_token: bytes
    segment_name: str
    offset: int
    expires_at: _timestamp_pb2.Timestamp
    expires_in: _duration_pb2.Duration
    def __init__(self, capture: _Optional[int] = ..., header: _Optional[_Union[CaptureHeader, _Mapping]] = ..., lease_token: _Optional[bytes] = ..., segment_name: _Optional[str] = ..., offset: _Optional[int] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_in: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CaptureHeld(_message.Message):
    __slots__ = ("capture_id", "output_index", "layers", "rows", "total_bytes", "expires_at", "spans", "site", "dtype", "hidden_size", "pooling", "expires_in", "instance")
    CAPTURE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    capture_id: str
    output_index: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    rows: int
    total_bytes: int
    expires_at: _timestamp_pb2.Timestamp
    spans: _containers.RepeatedCompositeFieldContainer[_position_pb2.RowSpan]
    site: CaptureSite
    dtype: _tensor_pb2.Dtype
    hidden_size: int
    pooling: Pooling
    expires_in: _duration_pb2.Duration
    instance: str
    def __init__(self, capture_id: _Optional[str] = ..., output_index: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., rows: _Optional[int] = ..., total_bytes: _Optional[int] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., spans: _Optional[_Iterable[_Union[_position_pb2.RowSpan, _Mapping]]] = ..., site: _Optional[_Union[CaptureSite, str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., hidden_size: _Optional[int] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., expires_in: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., instance: _Optional[str] = ...) -> None: ...
