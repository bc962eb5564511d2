"""Which vectors a client need not send again."""

from steer_service.core.errors import MissingVectors
from steer_service.core.specs import SteeringSpec

MIN_NAMED_BYTES = 256
"""Smaller vectors are always sent: a name takes 34 bytes."""

MAX_NAMES = 1 << 16
"""Most names to remember, 32 bytes each: more vectors than a server stores for one client by default."""


class UploadedVectors:
    """Digests of the vectors that the server stores for this client; may be used from several threads."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, spec: SteeringSpec) -> None:
        """Records that the server stores the vectors of `spec`; small ones, which are always sent, are left out."""
        if len(self._names) > MAX_NAMES:
            self._names.clear()
        pairs = zip(spec.vector_digests(), spec.vectors(), strict=True)
        self._names.update(digest for digest, vector in pairs if vector.nbytes >= MIN_NAMED_BYTES)

    def forget(self, error: MissingVectors) -> None:
        """Removes the vectors that the server no longer stores."""
        if error.count > len(error.digests):
            self._names.clear()
        else:
            self._names.difference_update(error.digests)
