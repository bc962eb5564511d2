"""What a server says about itself."""

from dataclasses import dataclass, field

from steer_service.core.start_proof import StartProof


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The limits of requests to a server."""

    max_message_bytes: int
    """Bytes of one request message."""
    max_chunk_bytes: int
    """Bytes of one chunk of captured rows."""
    max_concurrent_requests: int
    """Requests that run or wait at once, of all clients; further ones are refused with Overloaded."""
    max_outputs: int
    """Outputs of one request."""
    max_vector_bytes: int
    """Bytes of stored vectors of one client; 0 if the server stores none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """Facts about a server."""

    version: str
    """Version of its software."""
    api_revision: int
    """Revision of the contract that it implements; every addition to the contract increases it."""
    minimum_client_revision: int
    """Oldest revision of the contract that a client may use."""
    instance_id: str
    """Names this run of the server; different after every start."""
    instance: str = ""
    """Its name among the servers behind a balancer."""
    limits: ServerLimits
    """Limits of requests."""
    features: frozenset[str] = field(default_factory=frozenset)
    """Parts of the contract that are switched on, such as `capture_live`: the names of `Feature` in lower case."""
    start_proof: StartProof | None = None
    """What the engine proved about itself when it started; None while the model loads, or if it proves nothing."""
