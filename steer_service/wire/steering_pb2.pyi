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

class AddScaling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADD_SCALING_UNSPECIFIED: _ClassVar[AddScaling]
    ADD_SCALING_ABSOLUTE: _ClassVar[AddScaling]
    ADD_SCALING_RELATIVE: _ClassVar[AddScaling]
ADD_SCALING_UNSPECIFIED: AddScaling
ADD_SCALING_ABSOLUTE: AddScaling
ADD_SCALING_RELATIVE: AddScaling

class UploadVectorRequest(_message.Message):
    __slots__ = ("vector", "digest")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    vector: _tensor_pb2.Tensor
    digest: bytes
    def __init__(self, vector: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class UploadVectorResponse(_message.Message):
    __slots__ = ("digest", "created")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    created: bool
    def __init__(self, digest: _Optional[bytes] = ..., created: bool = ...) -> None: ...

class GetVectorRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class GetVectorResponse(_message.Message):
    __slots__ = ("vector",)
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    vector: _tensor_pb2.Tensor
    def __init__(self, vector: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ListVectorsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListVectorsResponse(_message.Message):
    __slots__ = ("vectors", "next_page_token")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    vectors: _containers.RepeatedCompositeFieldContainer[StoredVector]
    next_page_token: str
    def __init__(self, vectors: _Optional[_Iterable[_Union[StoredVector, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class StoredVector(_message.Message):
    __slots__ = ("digest", "size", "stored_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size: int
    stored_bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class DeleteVectorRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class DeleteVectorResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: bool = ...) -> None: ...

class SteeringSpec(_message.Message):
    __slots__ = ("layers", "positions", "report_change")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    REPORT_CHANGE_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerSteeringSpec]
    positions: _position_pb2.PositionScope
    report_change: bool
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerSteeringSpec, _Mapping]]] = ..., positions: _Optional[_Union[_position_pb2.PositionScope, _Mapping]] = ..., report_change: bool = ...) -> None: ...

class LayerSteeringSpec(_message.Message):
    __slots__ = ("layer", "operations", "hook")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    HOOK_FIELD_NUMBER: _ClassVar[int]
    layer: int
    operations: _containers.RepeatedCompositeFieldContainer[SteeringOperation]
    hook: _hook_point_pb2.HookPoint
    def __init__(self, layer: _Optional[int] = ..., operations: _Optional[_Iterable[_Union[SteeringOperation, _Mapping]]] = ..., hook: _Optional[_Union[_hook_point_pb2.HookPoint, str]] = ...) -> None: ...

class SteeringOperation(_message.Message):
    __slots__ = ("add", "projection_cap", "ablation", "positions", "max_relative_change", "keep_norm")
    ADD_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_CAP_FIELD_NUMBER: _ClassVar[int]
    ABLATION_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_RELATIVE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    KEEP_NORM_FIELD_NUMBER: _ClassVar[int]
    add: AddSpec
    projection_cap: ProjectionCapSpec
    ablation: AblationSpec
    positions: _position_pb2.PositionScope
    max_relative_change: float
    keep_norm: bool
    def __init__(self, add: _Optional[_Union[AddSpec, _Mapping]] = ..., projection_cap: _Optional[_Union[ProjectionCapSpec, _Mapping]] = ..., ablation: _Optional[_Union[AblationSpec, _Mapping]] = ..., positions: _Optional[_Union[_position_pb2.PositionScope, _Mapping]] = ..., max_relative_change: _Optional[float] = ..., keep_norm: bool = ...) -> None: ...

class AddSpec(_message.Message):
    __slots__ = ("vector", "scale", "scaling")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    vector: Vector
    scale: float
    scaling: AddScaling
    def __init__(self, vector: _Optional[_Union[Vector, _Mapping]] = ..., scale: _Optional[float] = ..., scaling: _Optional[_Union[AddScaling, str]] = ...) -> None: ...

class ProjectionCapSpec(_message.Message):
    __slots__ = ("vector", "min", "max")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    vector: Vector
    min: float
    max: float
    def __init__(self, vector: _Optional[_Union[Vector, _Mapping]] = ..., min: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...

class AblationSpec(_message.Message):
    __slots__ = ("vector", "scale")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    vector: Vector
    scale: float
    def __init__(self, vector: _Optional[_Union[Vector, _Mapping]] = ..., scale: _Optional[float] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("inline", "digest")
    INLINE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    inline: _tensor_pb2.Tensor
    digest: bytes
    def __init__(self, inline: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class MissingVectors(_message.Message):
    __slots__ = ("digests", "count")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    count: int
    def __init__(self, digests: _Optional[_Iterable[bytes]] = ..., count: _Optional[int] = ...) -> None: ...
