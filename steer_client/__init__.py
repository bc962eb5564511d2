"""The client of steerllm: a served model with per-request steering and hidden-state capture.

Needs numpy, ml_dtypes and gRPC; neither torch nor vLLM nor transformers. Only lm_eval_model needs more.

aio               AsyncSteerClient
sync              SteerClient: the same without an event loop
sync_handles      SyncCaptureHandle
forks             refuses gRPC where a fork broke it; imported first
quiet_loops       keeps gRPC quiet with several event loops
channel           the address, the options of the channel and the metadata of every call
connection_errors  the error of a failed call, with its cause in a sentence
http_proxies      which HTTP proxy gRPC takes
facts             facts about the model and the server
readiness         waiting for a server
open_calls        calls that end with their channel
watched_calls     calls that end when their server is silent
capture_handles   captures on the server or in shared memory
shared_memory     proof that memory is shared with the server, and mapping it
other_instances   repeats calls that reached the wrong one of several servers
uploaded_vectors  which vectors the server already stores
lm_eval_model     a served model for lm-eval, EleutherAI's harness; needs the extra `lm-eval`
"""

import steer_client.forks  # before anything imports grpc
import steer_client.quiet_loops  # noqa: F401
from steer_client.aio import AsyncSteerClient
from steer_client.sync import SteerClient
from steer_client.sync_handles import SyncCaptureHandle
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import (
    CaptureDelivery,
    CapturedRows,
    CaptureEntry,
    Captures,
    CaptureSite,
    CaptureSpec,
    MessageBoundary,
    Pooling,
    RowLabels,
    SharedMemoryFallback,
    TorchCaptures,
)
from steer_service.core.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MissingVectors,
    NotFound,
    OtherInstance,
    OverBudget,
    Overloaded,
    PermissionDenied,
    SteerError,
    Unauthenticated,
    Unsupported,
)
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Completed,
    Event,
    FinishReason,
    OutputFinished,
    PromptLogprobs,
    Receipt,
    Started,
    TokenDelta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from steer_service.core.hook_point import HookPoint
from steer_service.core.layer_change import LayerChange
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt, ToolCall
from steer_service.core.prompt_tokens import PromptTokens
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingKeywords, SamplingOptions
from steer_service.core.server_info import ServerInfo, ServerLimits
from steer_service.core.specs import (
    AblationSpec,
    AddScaling,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.core.stored_capture import CaptureMetadata, HeldCapture
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.formats.capture_dataset import CaptureShard, load_captures
from steer_service.formats.checkpoint import load_spec
from steer_service.formats.spec_json import spec_from_json, spec_from_text, spec_to_json
from steer_service.formats.vector_files import read_vectors
from steer_service.runtime.handle import CaptureHandle, fetch_all
from steer_service.runtime.results import (
    ChatResponse,
    ChatResponses,
    Generation,
    Generations,
    Output,
    PartialGenerations,
    Texts,
)
from steer_service.runtime.scoring import AnswerScore
from steer_service.runtime.stream_events import OutputCaptured, StreamEvent
from steer_service.wire.channels import tls_credentials

__all__ = [
    # clients
    "AsyncSteerClient",
    "SteerClient",
    "tls_credentials",
    # steering
    "AddScaling",
    "AddSpec",
    "ProjectionCapSpec",
    "AblationSpec",
    "SteeringOp",
    "LayerSteeringSpec",
    "SteeringSpec",
    "HookPoint",
    "PositionScope",
    "PositionRange",
    "load_spec",
    "spec_from_json",
    "spec_from_text",
    "spec_to_json",
    "read_vectors",
    # requests
    "TextPrompt",
    "TokenPrompt",
    "ChatPrompt",
    "ChatMessage",
    "ToolCall",
    "SamplingOptions",
    "StructuredOutputs",
    "SamplingKeywords",
    "CaptureSpec",
    "CaptureSite",
    "CaptureDelivery",
    "Pooling",
    "GenerateRequest",
    # results
    "Texts",
    "ChatResponses",
    "ChatResponse",
    "Generations",
    "PartialGenerations",
    "Generation",
    "Output",
    "AnswerScore",
    "CaptureHandle",
    "SyncCaptureHandle",
    "fetch_all",
    "Captures",
    "TorchCaptures",
    "CaptureEntry",
    "load_captures",
    "CaptureShard",
    "CapturedRows",
    "RowLabels",
    "HeldCapture",
    "CaptureMetadata",
    "SharedMemoryFallback",
    "MessageBoundary",
    "PromptTokens",
    "Receipt",
    "LayerChange",
    "Usage",
    "FinishReason",
    "TokenLogprob",
    "TopLogprob",
    "ModelInfo",
    "ServerInfo",
    "ServerLimits",
    # events
    "Event",
    "Started",
    "PromptLogprobs",
    "TokenDelta",
    "CaptureLabels",
    "CaptureBlock",
    "CaptureHeld",
    "OutputFinished",
    "Completed",
    "StreamEvent",
    "OutputCaptured",
    # errors
    "SteerError",
    "InvalidRequest",
    "NotFound",
    "MissingVectors",
    "OtherInstance",
    "Unsupported",
    "Overloaded",
    "OverBudget",
    "DeadlineExceeded",
    "PermissionDenied",
    "Unauthenticated",
    "EngineFailed",
]
