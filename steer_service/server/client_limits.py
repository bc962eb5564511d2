"""How much one client may have at once: what its entry in the token file says, or else the server's own limits."""

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

    def _quota(self, share: str) -> Quota:
        if self._tokens is None or not share.startswith(IDENTITY):
            return SERVER_QUOTA
        return self._tokens.quota_of(share.removeprefix(IDENTITY))
