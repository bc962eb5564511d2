"""Which vectors a client need not send again."""

from steer_service.core.errors import MissingVectors
from steer_service.core.specs import SteeringSpec

MIN_NAMED_BYTES = 256
"""Vectors of fewer bytes are always sent: a name takes 34 of them."""

MAX_NAMES = 1 << 16
"""Names remembered at most, of 32 bytes each: more vectors than a server keeps for one client by default."""


class UploadedVectors:
    """Names of vectors that the server has said to store for this client; for use from several threads."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def update_requests(self, spec: SteeringSpec) -> None:
        """Remembers the vectors of `spec`, which are stored, as far as naming them saves anything."""
        if len(self._names) > MAX_NAMES:
            self._names.clear()
        pairs = zip(spec.vector_digests(), spec.vectors(), strict=True)
        self._names.update(digest for digest, vector in pairs if vector.nbytes >= MIN_NAMED_BYTES)

    def forget(self, error: MissingVectors) -> None:
        """Unlearns what the server does not store any more."""
        if error.count > len(error.digests):
            self._names.clear()
        else:
            self._names.difference_update(error.digests)
