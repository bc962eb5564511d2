"""What a server says about itself, beside its model."""

from dataclasses import dataclass

from steer_service.core.start_proof import StartProof


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """The answer of GetServerInfo."""

    version: str
    """Version of steerllm."""
    api_revision: int
    """Revision of the contract that it implements."""
    minimum_client_revision: int
    """Oldest revision that a client may use."""
    instance: str
    """Its name among several servers behind a balancer."""
    instance_id: str
    """Identifies this run; another one after every start."""
    max_message_bytes: int
    """Bytes of one request at most."""
    max_concurrent_requests: int
    """Requests that run or wait at once."""
    max_outputs: int
    """Outputs of one request at most."""
    max_vector_bytes: int
    """Bytes of stored vectors of one client; 0 if none are stored."""
    features: tuple[str, ...]
    """Parts of the contract that are switched on, such as `shared_memory`."""
    start_proof: StartProof | None
    """What the engine proved about itself; None while the model loads."""
