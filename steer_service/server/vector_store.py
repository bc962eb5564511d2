"""The vectors that clients have stored, by digest, within byte limits; the least recently used are evicted first."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import OverBudget
from steer_service.core.specs import SteeringSpec

OVERHEAD_BYTES = 512
"""Bytes that a vector counts besides its elements: about the size of its digest and its table entries."""


PROTECTED_S = 60.0
"""Seconds after its last use for which no other client evicts a vector."""


@dataclass(slots=True, kw_only=True, eq=False)
class StoredVector:
    """One vector of one client."""

    client_id: str
    """The client it belongs to; no other client can see it."""
    digest: bytes
    """The digest that names it, 32 bytes."""
    vector: Float32Array
    """Its elements, float32, shape [hidden_size], read-only."""
    last_use: int = 0
    """Number of its last use among all uses of its client's vectors."""
    used_at: float = 0.0
    """Time of its last use on the monotonic clock, in seconds."""
    users: int = 0
    """The number of running requests that use it; it is not evicted while there are any."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that it counts towards the limits."""
        return self.vector.nbytes + OVERHEAD_BYTES


@dataclass(slots=True)
class _Share:
    """The vectors of one client."""

    vectors: OrderedDict[bytes, StoredVector] = field(default_factory=OrderedDict)
    """By digest, the least recently used first."""
    total_bytes: int = 0
    """Bytes that they count towards the limits."""
    uses: int = 0
    """Uses of its vectors so far."""


class VectorStore:
    """Stores vectors within `limit_bytes` for all clients together and `client_limit_bytes` for each.

    A client evicts its own vectors, and those of others only if they were not used for `protected_s` seconds: whoever
    invents client ids empties no one's share. Belongs to one event loop.
    """

    def __init__(
        self,
        limit_bytes: int,
        client_limit_bytes: int,
        *,
        protected_s: float = PROTECTED_S,
        limit_of: Callable[[str], int] | None = None,
    ) -> None:
        """`limit_of`: the limit of a client by its id, where clients have limits of their own."""
        self.client_limit_bytes = min(limit_bytes, client_limit_bytes)
        """Bytes that one client may have stored; 0 if nothing is stored."""
        self.total_bytes = 0
        """Bytes stored for all clients together."""
        self._limit_of = limit_of or (lambda _: self.client_limit_bytes)
        self.limit_bytes = limit_bytes
        """Bytes that may be stored for all clients together."""
        self.hits = 0
        """Vectors that requests named and that were stored."""
        self.misses = 0
        """Vectors that requests named and that were not."""
        self.evictions = 0
        """Vectors that made room for others."""
        self._protected_s = protected_s
        self._by_use: OrderedDict[tuple[str, bytes], StoredVector] = OrderedDict()
        self._shares: dict[str, _Share] = {}

    def __len__(self) -> int:
        return len(self._by_use)

    def put(self, client_id: str, digest: bytes, vector: Float32Array) -> StoredVector:
        """Stores `vector` under its `digest`, or renews it; evicts other vectors if there is no room.

        Raises OverBudget if it is larger than the limit, or if running requests use too many others.
        """
        known = self.find(client_id, digest)
        if known is not None:
            return known
        stored = StoredVector(client_id=client_id, digest=digest, vector=_in_own_memory(vector))
        self._make_room(client_id, stored.stored_bytes)
        share = self._shares.setdefault(client_id, _Share())
        share.vectors[digest] = self._by_use[client_id, digest] = stored
        share.total_bytes += stored.stored_bytes
        self.total_bytes += stored.stored_bytes
        self._note_use(stored)
        return stored

    def find(self, client_id: str, digest: bytes) -> StoredVector | None:
        """The client's vector with that digest, or None; counts as a use of it."""
        stored = self._by_use.get((client_id, digest))
        if stored is not None:
            self._note_use(stored)
            self._by_use.move_to_end((client_id, digest))
            self._shares[client_id].vectors.move_to_end(digest)
        return stored

    def holds(self, client_id: str, digest: bytes) -> bool:
        """True if the client's vector with that digest is stored; does not count as a use."""
        return (client_id, digest) in self._by_use

    def forget(self, client_id: str, digest: bytes) -> bool:
        """Removes the client's vector with that digest; False if there is none. Running requests keep it."""
        stored = self._by_use.get((client_id, digest))
        if stored is not None:
            self._remove(stored)
        return stored is not None

    def listed(self, client_id: str, before: int | None = None) -> Iterator[StoredVector]:
        """The client's vectors, the most recently used first. `before`: only those with a smaller `last_use`."""
        share = self._shares.get(client_id, _Share())
        return (one for one in reversed(share.vectors.values()) if before is None or one.last_use < before)

    def named(self, client_id: str, digests: Iterable[bytes]) -> dict[bytes, Float32Array]:
        """The client's stored vectors among these digests; counts as a use of them."""
        found = {digest: self.find(client_id, digest) for digest in digests}
        stored_here = {digest: stored.vector for digest, stored in found.items() if stored is not None}
        self.hits += len(stored_here)
        self.misses += len(found) - len(stored_here)
        return stored_here

    @contextmanager
    def using(self, client_id: str, named: Iterable[bytes], carries_others: bool) -> Iterator["VectorUse"]:
        """Protects the vectors of one request from eviction for the duration of the block.

        `named` are digests of stored vectors; `carries_others` is true if the request also carries vectors.
        """
        use = VectorUse(self, client_id, carries_others)
        try:
            for digest in named:
                use.hold(self._by_use[client_id, digest])
            yield use
        finally:
            use.end()

    def _make_room(self, client_id: str, needed: int) -> None:
        limit = self._limit_of(client_id)
        if needed > limit:
            raise _no_room(needed, limit, "a client may store", retry_after_s=None)
        while (share := self._shares.get(client_id)) and share.total_bytes + needed > limit:
            self._remove_idle(share.vectors.values(), needed, limit - share.total_bytes)
        while self.total_bytes + needed > self.limit_bytes:
            since = time.monotonic() - self._protected_s
            candidates = (one for one in self._by_use.values() if one.client_id == client_id or one.used_at <= since)
            self._remove_idle(candidates, needed, self.limit_bytes - self.total_bytes)

    def _note_use(self, stored: StoredVector) -> None:
        share = self._shares[stored.client_id]
        share.uses += 1
        stored.last_use, stored.used_at = share.uses, time.monotonic()

    def _remove_idle(self, candidates: Iterable[StoredVector], needed: int, free: int) -> None:
        """Evicts the first candidate that no request uses; raises OverBudget if there is none."""
        idle = next((stored for stored in candidates if not stored.users), None)
        if idle is None:
            raise _no_room(needed, free, "are free, the others are in use", retry_after_s=1.0)
        self._remove(idle)
        self.evictions += 1

    def _remove(self, stored: StoredVector) -> None:
        share = self._shares[stored.client_id]
        del self._by_use[stored.client_id, stored.digest], share.vectors[stored.digest]
        share.total_bytes -= stored.stored_bytes
        self.total_bytes -= stored.stored_bytes
        if not share.vectors:
            del self._shares[stored.client_id]


class VectorUse:
    """The stored vectors that one running request uses, all of one client."""

    def __init__(self, store: VectorStore, client_id: str, carries_others: bool) -> None:
        self._store = store
        self._client_id = client_id
        self._carries_others = carries_others
        self._used: list[StoredVector] = []

    def hold(self, stored: StoredVector) -> None:
        """Protects a vector from eviction until `end`."""
        stored.users += 1
        self._used.append(stored)

    def keep(self, spec: SteeringSpec | None) -> bool:
        """Stores the vectors that the request carries; True if all vectors of its `spec` are stored now."""
        if spec is None or not self._client_id or not self._store.client_limit_bytes:
            return False
        if not self._carries_others:  # all of them are held already; do not hash them again
            return True
        try:
            for digest, vector in zip(spec.vector_digests(), spec.vectors(), strict=True):
                self.hold(self._store.put(self._client_id, digest, vector))
        except OverBudget:
            return False
        return True

    def end(self) -> None:
        """Ends the protection of all vectors of the request."""
        for stored in self._used:
            stored.users -= 1
        self._used.clear()


def _in_own_memory(vector: Float32Array) -> Float32Array:
    """`vector` in memory of its own: a view would keep the whole program that it came with."""
    if vector.base is None:
        return vector
    copy = vector.copy()
    copy.flags.writeable = False
    return copy


def _no_room(needed: int, allowed: int, rule: str, retry_after_s: float | None) -> OverBudget:
    return OverBudget(
        f"the vector takes {needed} bytes, {allowed} {rule}",
        asked_bytes=needed,
        allowed_bytes=allowed,
        field="vector",
        retry_after_s=retry_after_s,
    )
