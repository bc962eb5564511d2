"""ModelInfo, ServerInfo and StartProof <-> their messages, field by field."""

from steer_service.core.backend import ModelInfo
from steer_service.core.number_limits import DEFAULT_MAX_LOGPROBS, MAX_TEMPERATURE
from steer_service.core.server_info import ServerInfo, ServerLimits
from steer_service.core.start_proof import StartProof
from steer_service.wire import info_pb2
from steer_service.wire.tensors import dtype_from_proto, dtype_to_proto


def model_info_to_proto(info: ModelInfo) -> info_pb2.ModelInfo:
    """`info` as a message."""
    return info_pb2.ModelInfo(
        name=info.name,
        architecture=info.architecture,
        layer_count=info.layer_count,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        dtype=dtype_to_proto(info.dtype),
        max_programs=info.max_programs,
        max_operations=info.max_operations,
        max_operations_per_layer=info.max_operations_per_layer,
        adapters=info.adapters,
        aliases=info.aliases,
        max_logprobs=info.max_logprobs,
        max_temperature=info.max_temperature,
        special_token_ids=info.special_token_ids,
        has_chat_template=info.has_chat_template,
        max_prompt_tokens=info.max_prompt_tokens,
    )


def model_info_from_proto(message: info_pb2.ModelInfo) -> ModelInfo:
    """The info in a message; raises InvalidRequest (UNKNOWN_DTYPE) for a dtype that is not known."""
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        layer_count=message.layer_count,
        hidden_size=message.hidden_size,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        dtype=dtype_from_proto(message.dtype),
        max_programs=message.max_programs,
        max_operations=message.max_operations,
        max_operations_per_layer=message.max_operations_per_layer,
        adapters=tuple(message.adapters),
        aliases=tuple(message.aliases),
        max_logprobs=message.max_logprobs if message.HasField("max_logprobs") else DEFAULT_MAX_LOGPROBS,
        max_temperature=message.max_temperature if message.HasField("max_temperature") else MAX_TEMPERATURE,
        special_token_ids=tuple(message.special_token_ids),
        has_chat_template=message.has_chat_template,
        max_prompt_tokens=message.max_prompt_tokens,
    )


def start_proof_to_proto(proof: StartProof) -> info_pb2.StartProof:
    """`proof` as a message."""
    return info_pb2.StartProof(
        device=proof.device,
        seconds=proof.seconds,
        kernel_rows=proof.kernel_rows,
        kernel_error=proof.kernel_error,
        step_classes=proof.step_classes,
        is_exact=proof.is_exact,
        staging_bytes=proof.staging_bytes,
        pinned_bytes=proof.pinned_bytes,
    )


def start_proof_from_proto(message: info_pb2.StartProof) -> StartProof:
    """The proof in a message."""
    return StartProof(
        device=message.device,
        seconds=message.seconds,
        kernel_rows=message.kernel_rows,
        kernel_error=message.kernel_error,
        step_classes=tuple(message.step_classes),
        is_exact=message.is_exact,
        staging_bytes=message.staging_bytes,
        pinned_bytes=message.pinned_bytes,
    )


def server_info_from_proto(message: info_pb2.GetServerInfoResponse) -> ServerInfo:
    """The facts in a response; a feature of a later revision has its number in its name."""
    limits = message.limits
    return ServerInfo(
        version=message.server_version,
        api_revision=message.api_revision,
        minimum_client_revision=message.minimum_client_revision,
        instance_id=message.instance_id,
        instance=message.instance,
        limits=ServerLimits(
            max_message_bytes=limits.max_message_bytes,
            max_chunk_bytes=limits.max_chunk_bytes,
            max_concurrent_requests=limits.max_concurrent_requests,
            max_outputs=limits.max_outputs,
            max_vector_bytes=limits.max_vector_bytes,
        ),
        features=frozenset(map(_feature_name, message.features)),
        start_proof=start_proof_from_proto(message.start_proof) if message.HasField("start_proof") else None,
    )


def _feature_name(number: int) -> str:
    known = info_pb2.Feature.DESCRIPTOR.values_by_number.get(number)
    return f"feature_{number}" if known is None else known.name.removeprefix("FEATURE_").lower()
