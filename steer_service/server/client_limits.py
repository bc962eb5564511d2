"""How much one client may have at once: what its entry in the token file says, or else the server's own limits."""

from steer_service.core.errors import PermissionDenied
from steer_service.server.callers import IDENTITY
from steer_service.server.config import ServerConfig
from steer_service.server.tokens import Quota, TokenFile

SERVER_QUOTA = Quota()


class ClientLimits:
    """The limits of clients by their share (`Caller.share`), as the token file says now."""

    def __init__(self, config: ServerConfig, tokens: TokenFile | None) -> None:
        self._config = config
        self._tokens = tokens

    def requests(self, share: str) -> int:
        """Requests that run or wait; 0: no limit of its own."""
        return self._quota(share).max_requests or self._config.max_client_requests

    def fetches(self, share: str) -> int:
        """Captures that it fetches."""
        return self._quota(share).max_fetches or self._config.max_client_fetches

    def sessions(self, share: str) -> int:
        """Shared-memory sessions."""
        return self._quota(share).max_sessions or self._config.max_client_sessions

    def capture_bytes(self, share: str) -> int | None:
        """Bytes of capture memory; None: what the pool of captures gives every client."""
        return self._quota(share).max_capture_bytes

    def vector_bytes(self, share: str) -> int:
        """Bytes of stored vectors; never more than are stored for all clients together."""
        most = self._quota(share).max_vector_bytes or self._config.client_vector_bytes
        return min(most, self._config.vector_store_bytes)

    def check_allowed(self, owner: str, permission: str) -> None:
        """Raises PermissionDenied if the token file does not allow a client one of its PERMISSIONS."""
        if self._tokens is None or not owner.startswith(IDENTITY):
            return
        if not self._tokens.may(owner.removeprefix(IDENTITY), permission):
            raise PermissionDenied(f"this client may not use {permission} on this server", field=permission)

    def _quota(self, share: str) -> Quota:
        if self._tokens is None or not share.startswith(IDENTITY):
            return SERVER_QUOTA
        return self._tokens.quota_of(share.removeprefix(IDENTITY))
