from steer_service.wire import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Feature(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_UNSPECIFIED: _ClassVar[Feature]
    FEATURE_STEERING: _ClassVar[Feature]
    FEATURE_STORED_VECTORS: _ClassVar[Feature]
    FEATURE_STEERING_POSITIONS: _ClassVar[Feature]
    FEATURE_CAPTURE: _ClassVar[Feature]
    FEATURE_CAPTURE_BEFORE: _ClassVar[Feature]
    FEATURE_CAPTURE_POSITIONS: _ClassVar[Feature]
    FEATURE_CAPTURE_DTYPE: _ClassVar[Feature]
    FEATURE_CAPTURE_LIVE: _ClassVar[Feature]
    FEATURE_CAPTURE_HELD: _ClassVar[Feature]
    FEATURE_SHARED_MEMORY: _ClassVar[Feature]
    FEATURE_TIME_BUDGET: _ClassVar[Feature]
    FEATURE_CHAT_TEMPLATE_OPTIONS: _ClassVar[Feature]
    FEATURE_TOKENIZER: _ClassVar[Feature]
    FEATURE_POSITIONS_BY_MESSAGE: _ClassVar[Feature]
    FEATURE_PROMPT_LOGPROBS: _ClassVar[Feature]
    FEATURE_STRUCTURED_OUTPUTS: _ClassVar[Feature]
    FEATURE_PRIORITY: _ClassVar[Feature]
    FEATURE_OPERATION_POSITIONS: _ClassVar[Feature]
    FEATURE_RELATIVE_STEERING: _ClassVar[Feature]
    FEATURE_CHANGE_REPORT: _ClassVar[Feature]
    FEATURE_CAPTURE_POOLING: _ClassVar[Feature]
FEATURE_UNSPECIFIED: Feature
FEATURE_STEERING: Feature
FEATURE_STORED_VECTORS: Feature
FEATURE_STEERING_POSITIONS: Feature
FEATURE_CAPTURE: Feature
FEATURE_CAPTURE_BEFORE: Feature
FEATURE_CAPTURE_POSITIONS: Feature
FEATURE_CAPTURE_DTYPE: Feature
FEATURE_CAPTURE_LIVE: Feature
FEATURE_CAPTURE_HELD: Feature
FEATURE_SHARED_MEMORY: Feature
FEATURE_TIME_BUDGET: Feature
FEATURE_CHAT_TEMPLATE_OPTIONS: Feature
FEATURE_TOKENIZER: Feature
FEATURE_POSITIONS_BY_MESSAGE: Feature
FEATURE_PROMPT_LOGPROBS: Feature
FEATURE_STRUCTURED_OUTPUTS: Feature
FEATURE_PRIORITY: Feature
FEATURE_OPERATION_POSITIONS: Feature
FEATURE_RELATIVE_STEERING: Feature
FEATURE_CHANGE_REPORT: Feature
FEATURE_CAPTURE_POOLING: Feature

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("server_version", "api_revision", "minimum_client_revision", "instance_id", "limits", "features", "start_proof", "instance")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    API_REVISION_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_CLIENT_REVISION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    START_PROOF_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    api_revision: int
    minimum_client_revision: int
    instance_id: str
    limits: ServerLimits
    features: _containers.RepeatedScalarFieldContainer[Feature]
    start_proof: StartProof
    instance: str
    def __init__(self, server_version: _Optional[str] = ..., api_revision: _Optional[int] = ..., minimum_client_revision: _Optional[int] = ..., instance_id: _Optional[str] = ..., limits: _Optional[_Union[ServerLimits, _Mapping]] = ..., features: _Optional[_Iterable[_Union[Feature, str]]] = ..., start_proof: _Optional[_Union[StartProof, _Mapping]] = ..., instance: _Optional[str] = ...) -> None: ...

class StartProof(_message.Message):
    __slots__ = ("device", "seconds", "kernel_rows", "kernel_error", "step_classes", "is_exact", "staging_bytes", "pinned_bytes")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_ROWS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_ERROR_FIELD_NUMBER: _ClassVar[int]
    STEP_CLASSES_FIELD_NUMBER: _ClassVar[int]
    IS_EXACT_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    device: str
    seconds: float
    kernel_rows: int
    kernel_error: float
    step_classes: _containers.RepeatedScalarFieldContainer[str]
    is_exact: bool
    staging_bytes: int
    pinned_bytes: int
    def __init__(self, device: _Optional[str] = ..., seconds: _Optional[float] = ..., kernel_rows: _Optional[int] = ..., kernel_error: _Optional[float] = ..., step_classes: _Optional[_Iterable[str]] = ..., is_exact: bool = ..., staging_bytes: _Optional[int] = ..., pinned_bytes: _Optional[int] = ...) -> None: ...

class ServerLimits(_message.Message):
    __slots__ = ("max_message_bytes", "max_chunk_bytes", "max_concurrent_requests", "max_outputs", "max_vector_bytes")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_VECTOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_chunk_bytes: int
    max_concurrent_requests: int
    max_outputs: int
    max_vector_bytes: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_concurrent_requests: _Optional[int] = ..., max_outputs: _Optional[int] = ..., max_vector_bytes: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "architecture", "layer_count", "hidden_size", "vocab_size", "max_model_len", "dtype", "max_programs", "max_operations", "max_operations_per_layer", "adapters", "max_logprobs", "max_temperature", "special_token_ids", "aliases", "has_chat_template", "max_prompt_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_OPERATIONS_PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    dtype: _tensor_pb2.Dtype
    max_programs: int
    max_operations: int
    max_operations_per_layer: int
    adapters: _containers.RepeatedScalarFieldContainer[str]
    max_logprobs: int
    max_temperature: float
    special_token_ids: _containers.RepeatedScalarFieldContainer[int]
    aliases: _containers.RepeatedScalarFieldContainer[str]
    has_chat_template: bool
    max_prompt_tokens: int
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., layer_count: _Optional[int] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., max_programs: _Optional[int] = ..., max_operations: _Optional[int] = ..., max_operations_per_layer: _Optional[int] = ..., adapters: _Optional[_Iterable[str]] = ..., max_logprobs: _Optional[int] = ..., max_temperature: _Optional[float] = ..., special_token_ids: _Optional[_Iterable[int]] = ..., aliases: _Optional[_Iterable[str]] = ..., has_chat_template: bool = ..., max_prompt_tokens: _Optional[int] = ...) -> None: ...
