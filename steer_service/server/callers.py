"""Who a call comes from: the server's only rule for what belongs to whom, and whose share it takes."""

from contextvars import ContextVar
from dataclasses import dataclass, field

import grpc

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.field_checks import check_identifier

CERTIFICATE_NAMES = ("x509_subject_alternative_name", "x509_common_name")
"""gRPC's keys of the names in a certificate, which it has for peers with a certificate alone."""

SPIFFE = "spiffe://"

CLIENT_ID = "steer-client-id"
"""Metadata key of the client id: a secret that the client chooses and sends with every call."""


IDENTITY = "identity "
"""Beginning of the share of a client whose name is proven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A client whose name is proven."""

    name: str
    """Of a token's client, or of a client's certificate: its SPIFFE id, or else its first other name."""

    @property
    def share(self) -> str:
        """The owner of what belongs to the client, and its share."""
        return IDENTITY + self.name


_identity: ContextVar[Identity | None] = ContextVar("identity", default=None)
"""Of the running call; each call runs in a task of its own."""


def identify(identity: Identity) -> None:
    """Names the client of the running call, before its handler runs."""
    _identity.set(identity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The caller of one RPC."""

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
    """The caller, named by its proven identity, or else by the id in the call's metadata, or else by its address.

    Raises InvalidRequest (BAD_CLIENT_ID) for an id that is not 1..128 of `A-Za-z0-9._:-`, or is given twice.
    """
    peer, identity = context.peer(), _identity.get() or _identity_of_certificate(context)
    if identity is not None:  # an id that it claims changes nothing
        return Caller(owner=identity.share, share=identity.share, connection=peer, is_authenticated=True)
    given = [value for key, value in context.invocation_metadata() or () if key == CLIENT_ID]
    if not given or given == [""]:
        return Caller(owner="", share=f"address {_host_of(peer)}", connection=peer)
    if len(given) > 1:
        raise InvalidRequest("it is given more than once", reason="BAD_CLIENT_ID", field=CLIENT_ID)
    name = given[0] if isinstance(given[0], str) else ""
    check_identifier(name, CLIENT_ID, reason="BAD_CLIENT_ID")
    return Caller(owner=f"client {name}", share=f"client {name}", connection=peer)


def _identity_of_certificate(context: grpc.aio.ServicerContext) -> Identity | None:
    """The identity of a client whose certificate was checked in the handshake; None without one."""
    auth = context.auth_context()
    names = [name.decode(errors="replace") for key in CERTIFICATE_NAMES for name in auth.get(key, ())]
    if not names:
        return None
    return Identity(name=next((name for name in names if name.startswith(SPIFFE)), names[0]))


def _host_of(peer: str) -> str:
    """The address without the port; all callers of a Unix socket have one address."""
    kind, _, rest = peer.partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind
