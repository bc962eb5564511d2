from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PositionScope(_message.Message):
    __slots__ = ("prompt", "generated", "ranges", "generated_ranges", "messages", "roles", "skip_special_tokens")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_RANGES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt: bool
    generated: bool
    ranges: _containers.RepeatedCompositeFieldContainer[PositionRange]
    generated_ranges: _containers.RepeatedCompositeFieldContainer[PositionRange]
    messages: _containers.RepeatedScalarFieldContainer[int]
    roles: _containers.RepeatedScalarFieldContainer[str]
    skip_special_tokens: bool
    def __init__(self, prompt: bool = ..., generated: bool = ..., ranges: _Optional[_Iterable[_Union[PositionRange, _Mapping]]] = ..., generated_ranges: _Optional[_Iterable[_Union[PositionRange, _Mapping]]] = ..., messages: _Optional[_Iterable[int]] = ..., roles: _Optional[_Iterable[str]] = ..., skip_special_tokens: bool = ...) -> None: ...

class PositionRange(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class RowSpan(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...
