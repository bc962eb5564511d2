"""Who a call comes from: the server's only rule for what belongs to whom, and whose share it takes."""

from dataclasses import dataclass, field

import grpc

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.field_checks import check_identifier

CLIENT_ID = "steer-client-id"
"""Metadata key of the client id: a secret that the client chooses and sends with every call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The caller of one RPC. Authentication, once there is some, makes these in place of `caller_of`."""

    owner: str
    """Owns the captures and vectors of the call. "" without an id: the secret that names a thing is the right to it."""
    share: str
    """Whose share of places and memory the call takes: the owner's, or that of its address without an id."""
    connection: str = field(compare=False)
    """The peer with its port; tells callers without an id apart."""
    is_authenticated: bool = False
    """True if the owner is proven and not only claimed."""

    @property
    def namespace(self) -> str:
        """Within which request ids differ."""
        return self.owner or self.connection

    def owner_of_vectors(self) -> str:
        """The owner; raises Unsupported (NO_CLIENT_ID) if there is none, as stored vectors are listed by owner."""
        if not self.owner:
            raise Unsupported(
                f"stored vectors belong to a client: send a secret of your own as {CLIENT_ID}",
                reason="NO_CLIENT_ID",
                field=CLIENT_ID,
            )
        return self.owner


def caller_of(context: grpc.aio.ServicerContext) -> Caller:
    """The caller, named by the call's metadata or else by its address.

    Raises InvalidRequest (BAD_CLIENT_ID) for an id that is not 1..128 of `A-Za-z0-9._:-`, or is given twice.
    """
    given = [value for key, value in context.invocation_metadata() or () if key == CLIENT_ID]
    peer = context.peer()
    if not given or given == [""]:
        return Caller(owner="", share=f"address {_host_of(peer)}", connection=peer)
    if len(given) > 1:
        raise InvalidRequest("it is given more than once", reason="BAD_CLIENT_ID", field=CLIENT_ID)
    name = given[0] if isinstance(given[0], str) else ""
    check_identifier(name, CLIENT_ID, reason="BAD_CLIENT_ID")
    return Caller(owner=f"client {name}", share=f"client {name}", connection=peer)


def _host_of(peer: str) -> str:
    """The address without the port; all callers of a Unix socket have one address."""
    kind, _, rest = peer.partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind
