"""The public names and their types: what users import is changed on purpose, and no signature hides behind Any."""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steer_client
import steer_service.engine
import steer_service.hf
from steer_service.core.sampling_options import SamplingKeywords, SamplingOptions
from steer_service.runtime.calls import SteeringCalls

ROOT = Path(__file__).parents[2]

HOLDS_JSON = {"spec_from_json", "spec_to_json", "CaptureShard"}
"""Parsed JSON has no type that says more than Any; `spec_to_json` also takes a `put` that chooses the JSON."""

WIDER_KEYWORDS = {"stop", "stop_token_ids", "logit_bias", "bad_words", "allowed_token_ids", "structured_outputs"}
"""Options that SamplingOptions converts: as keywords, any sequence, one string, a mapping and None are taken too."""


def test_the_names_of_the_client_change_on_purpose() -> None:
    assert sorted(steer_client.__all__) == [
        "AblationSpec",
        "AddScaling",
        "AddSpec",
        "AnswerScore",
        "AsyncSteerClient",
        "CaptureBlock",
        "CaptureDelivery",
        "CaptureEntry",
        "CaptureHandle",
        "CaptureHeld",
        "CaptureLabels",
        "CaptureMetadata",
        "CaptureShard",
        "CaptureSite",
        "CaptureSpec",
        "CapturedRows",
        "Captures",
        "ChatMessage",
        "ChatPrompt",
        "ChatResponse",
        "ChatResponses",
        "Completed",
        "DeadlineExceeded",
        "EngineFailed",
        "Event",
        "FinishReason",
        "GenerateRequest",
        "Generation",
        "Generations",
        "HeldCapture",
        "HookPoint",
        "InvalidRequest",
        "LayerChange",
        "LayerSteeringSpec",
        "MessageBoundary",
        "MissingVectors",
        "ModelInfo",
        "NotFound",
        "OtherInstance",
        "Output",
        "OutputCaptured",
        "OutputFinished",
        "OverBudget",
        "Overloaded",
        "PartialGenerations",
        "PermissionDenied",
        "Pooling",
        "PositionRange",
        "PositionScope",
        "ProjectionCapSpec",
        "PromptLogprobs",
        "PromptTokens",
        "Receipt",
        "RowLabels",
        "SamplingKeywords",
        "SamplingOptions",
        "ServerInfo",
        "ServerLimits",
        "SharedMemoryFallback",
        "Started",
        "SteerClient",
        "SteerError",
        "SteeringOp",
        "SteeringSpec",
        "StreamEvent",
        "StructuredOutputs",
        "SyncCaptureHandle",
        "TextPrompt",
        "Texts",
        "TokenDelta",
        "TokenLogprob",
        "TokenPrompt",
        "ToolCall",
        "TopLogprob",
        "TorchCaptures",
        "Unauthenticated",
        "Unsupported",
        "Usage",
        "fetch_all",
        "load_captures",
        "load_spec",
        "read_vectors",
        "spec_from_json",
        "spec_from_text",
        "spec_to_json",
        "tls_credentials",
    ]


def test_the_names_of_the_backends_change_on_purpose() -> None:
    assert sorted(steer_service.engine.__all__) == ["VLLMSteeringModel"]
    assert sorted(steer_service.hf.__all__) == ["HFSteeringModel", "TrainableAblation", "TrainableAdd", "TrainableCap"]


@pytest.mark.parametrize("name", sorted(set(steer_client.__all__) - HOLDS_JSON))
def test_no_public_signature_of_the_client_says_any(name: str) -> None:
    assert list(places_of_any(name, getattr(steer_client, name))) == []


def test_no_call_of_a_backend_says_any() -> None:
    assert list(places_of_any("SteeringCalls", SteeringCalls)) == []


def test_no_call_of_the_engine_says_any() -> None:
    module = ast.parse((ROOT / "steer_service/engine/model.py").read_text())  # importing it would import vLLM
    [model] = [node for node in module.body if isinstance(node, ast.ClassDef)]
    calls = [node for node in model.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    public = [call for call in calls if call.name == "__init__" or not call.name.startswith("_")]

    assert {call.name for call in public if "Any" in signature_of(call)} == {"__init__"}  # vLLM's own arguments


def test_any_is_found_wherever_it_is_hidden() -> None:
    class Sample:
        field: list[Any]

        def method(self, **options: Any) -> None: ...

        @property
        def fact(self) -> Mapping[str, Any]: ...

        @classmethod
        def make(cls, call: Callable[[Any], None]) -> None: ...

    assert sorted(places_of_any("Sample", Sample)) == ["Sample.fact", "Sample.field", "Sample.make", "Sample.method"]


def test_every_sampling_option_is_a_keyword_of_the_same_type() -> None:
    options, keywords = typing.get_type_hints(SamplingOptions), typing.get_type_hints(SamplingKeywords)

    assert list(keywords) == [field.name for field in dataclasses.fields(SamplingOptions)]
    assert {name: keywords[name] for name in keywords if name not in WIDER_KEYWORDS} == {
        name: options[name] for name in options if name not in WIDER_KEYWORDS
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", "x"),
        ("stop", ["x"]),
        ("stop_token_ids", [1]),
        ("logit_bias", {1: 2}),
        ("structured_outputs", {"regex": "a"}),
    ],
)
def test_the_wider_keywords_are_what_the_options_take(name: str, value: Any) -> None:
    assert getattr(SamplingOptions(**{name: value}), name)
    assert not getattr(SamplingOptions(**{name: None}), name)


def places_of_any(name: str, value: Any) -> Iterator[str]:
    """The public fields, methods and functions under `value`, called `name`, whose types hold Any."""
    if inspect.isclass(value):
        if any(holds_any(hint) for hint in typing.get_type_hints(value).values()):
            yield from (f"{name}.{at}" for at, hint in typing.get_type_hints(value).items() if holds_any(hint))
        for member, kind in vars(value).items():
            function = getattr(kind, "fget", None) or getattr(kind, "__func__", kind)
            if inspect.isfunction(function) and (member == "__init__" or not member.startswith("_")):
                yield from places_of_any(f"{name}.{member}", function)
    elif inspect.isfunction(value):
        signatures = typing.get_overloads(value) or [value]
        if any(holds_any(hint) for each in signatures for hint in typing.get_type_hints(each).values()):
            yield name
    elif holds_any(value):
        yield name


def signature_of(call: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"{ast.unparse(call.args)} -> {ast.unparse(call.returns) if call.returns is not None else None}"


def holds_any(hint: Any) -> bool:
    """True if Any is part of `hint`; the dtype and the shape of an array are known when the program runs."""
    if hint is Any:
        return True
    if typing.get_origin(hint) in (np.ndarray, np.dtype):
        return False
    if isinstance(hint, types.GenericAlias | types.UnionType) or typing.get_origin(hint) is not None:
        arguments = typing.get_args(hint)
    elif typing.is_typeddict(hint):
        arguments = tuple(typing.get_type_hints(hint).values())
    else:
        return False
    return any(holds_any(item) for each in arguments for item in (each if isinstance(each, list) else [each]))
