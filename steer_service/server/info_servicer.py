"""InfoService: facts about the server and its model."""

import importlib.metadata

import grpc

from steer_service.core.checks import check_served
from steer_service.core.number_limits import MAX_OUTPUTS
from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.admission import Admission
from steer_service.server.config import ServerConfig
from steer_service.server.instance import Instance
from steer_service.server.request_body import RequestBody
from steer_service.wire import info_pb2
from steer_service.wire.blocks import MAX_CHUNK_BYTES
from steer_service.wire.info import model_info_to_proto, start_proof_to_proto
from steer_service.wire.info_pb2_grpc import InfoServiceServicer

API_REVISION = 6
"""Revision of the contract that this server implements; each addition counts it up."""
MINIMUM_CLIENT_REVISION = 1
"""The oldest revision of a client that this server accepts."""

FEATURES = (
    info_pb2.FEATURE_STEERING,
    info_pb2.FEATURE_STEERING_POSITIONS,
    info_pb2.FEATURE_CAPTURE,
    info_pb2.FEATURE_CAPTURE_BEFORE,
    info_pb2.FEATURE_CAPTURE_POSITIONS,
    info_pb2.FEATURE_CAPTURE_DTYPE,
    info_pb2.FEATURE_CAPTURE_LIVE,
    info_pb2.FEATURE_CAPTURE_HELD,
    info_pb2.FEATURE_TIME_BUDGET,
    info_pb2.FEATURE_CHAT_TEMPLATE_OPTIONS,
    info_pb2.FEATURE_TOKENIZER,
    info_pb2.FEATURE_POSITIONS_BY_MESSAGE,
    info_pb2.FEATURE_PROMPT_LOGPROBS,
    info_pb2.FEATURE_OPERATION_POSITIONS,
    info_pb2.FEATURE_RELATIVE_STEERING,
    info_pb2.FEATURE_CAPTURE_POOLING,
    info_pb2.FEATURE_CHANGE_REPORT,
)
"""Features that every server has; `_features` adds those that can be switched off."""


class InfoServicer(InfoServiceServicer):
    """Serves GetServerInfo at any time, and GetModel once a backend is open."""

    def __init__(self, config: ServerConfig, admission: Admission, instance: Instance) -> None:
        self._config = config
        self._instance = instance
        self._admission = admission

    async def GetServerInfo(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> info_pb2.GetServerInfoResponse:
        """Returns the server's version, limits and features."""
        async with errors_as_status(context):
            body.read(info_pb2.GetServerInfoRequest)
            proof = self._admission.start_proof
            return info_pb2.GetServerInfoResponse(
                server_version=importlib.metadata.version("steerllm"),
                api_revision=API_REVISION,
                minimum_client_revision=MINIMUM_CLIENT_REVISION,
                instance_id=self._instance.run_id,
                limits=info_pb2.ServerLimits(
                    max_message_bytes=self._config.max_message_bytes,
                    max_chunk_bytes=MAX_CHUNK_BYTES,
                    max_concurrent_requests=self._config.max_concurrent_requests,
                    max_outputs=MAX_OUTPUTS,
                    max_vector_bytes=self._config.most_vector_bytes,
                ),
                features=_features(self._config, self._admission),
                instance=self._instance.name,
                start_proof=start_proof_to_proto(proof) if proof is not None else None,
            )

    async def GetModel(self, body: RequestBody, context: grpc.aio.ServicerContext) -> info_pb2.GetModelResponse:
        """Returns the model's name, sizes and limits."""
        async with errors_as_status(context):
            request = body.read(info_pb2.GetModelRequest)
            info = self._admission.backend.info
            check_served(request.name, info, field="name")
            return info_pb2.GetModelResponse(model=model_info_to_proto(info))


def _features(config: ServerConfig, admission: Admission) -> list[info_pb2.Feature]:
    features = list(FEATURES)
    if config.most_vector_bytes:
        features.append(info_pb2.FEATURE_STORED_VECTORS)
    if admission.has_structured_outputs:
        features.append(info_pb2.FEATURE_STRUCTURED_OUTPUTS)
    if admission.has_priority:
        features.append(info_pb2.FEATURE_PRIORITY)
    if config.shared_memory:
        features.append(info_pb2.FEATURE_SHARED_MEMORY)
    return features
