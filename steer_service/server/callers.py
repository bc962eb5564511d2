"""Who a call comes from: the server's only rule for what belongs to whom, and whose share it takes."""

import itertools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import grpc

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.field_checks import check_identifier
from steer_service.server.call_record import current_call
from steer_service.server.trusted_proxy import (
    CLIENT_CERTIFICATE,
    NAME,
    TrustedProxy,
    fairness_id,
    forwarded_name,
    nameless,
    peer_names,
    priority_of,
)

CLIENT_ID = "steer-client-id"
"""Metadata key of the client id: a secret that the client chooses and sends with every call."""

IDENTITY = "identity "
"""Beginning of the share of a client whose name is proven."""

CERTIFICATE = "x509_pem_cert"
"""gRPC's key of the certificate of a peer that has one."""

UNIX = "unix socket"
"""The share of all callers of a Unix socket, which its permissions admit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A client whose name is proven."""

    name: str
    """Of a token's client, or in a client's certificate: its SPIFFE id, or else its first other name."""

    @property
    def share(self) -> str:
        """The owner of what belongs to the client, and its share."""
        return IDENTITY + self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyRules:
    """Whose word about their clients counts, and what it means."""

    proxy: TrustedProxy | None = None
    """The peers that are trusted; None: no peer is."""
    priorities: Mapping[str, int] = field(default_factory=dict)
    """Priority of each objective that such a peer may name."""


_calls = itertools.count()

_identity: ContextVar[Identity | None] = ContextVar("identity", default=None)
"""Of the running call; each call runs in a task of its own."""

_rules: ContextVar[ProxyRules] = ContextVar("rules", default=ProxyRules())  # noqa: B039  # it is frozen
"""Of the server that runs the call."""


def identify(identity: Identity) -> None:
    """Names the client of the running call, before its handler runs."""
    _identity.set(identity)


def set_rules(rules: ProxyRules) -> None:
    """Sets what the peer of the running call may say, before its handler runs."""
    _rules.set(rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The caller of one RPC."""

    owner: str
    """Owns the captures and vectors of the call. "" without an id: the secret that names a thing is the right to it."""
    share: str
    """Whose share of memory and response streams the call takes: the owner's, or that of its address without an id."""
    connection: str = field(compare=False)
    """The peer with its port; tells callers without an id apart."""
    is_authenticated: bool = False
    """True if the owner is proven and not only claimed."""
    turn: str = ""
    """Whose turn it takes in the queue: the share's, or that which a trusted proxy names."""
    priority: int | None = None
    """Priority that a trusted proxy gives it; None: what the request says."""

    def __post_init__(self) -> None:
        if not self.turn:
            object.__setattr__(self, "turn", self.share)

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

    The call's record has a name of it from now on. Raises InvalidRequest (BAD_CLIENT_ID) for an id that is not 1..128
    of `A-Za-z0-9._:-`, or is given twice.
    """
    caller = _caller_of(context)
    current_call().name_client(caller.share.removeprefix(IDENTITY), is_proven=caller.is_authenticated)
    return caller


def _caller_of(context: grpc.aio.ServicerContext) -> Caller:
    peer, identity, rules = _peer_of(context), _identity.get() or identity_of_peer(context), _rules.get()
    turn, priority = "", None
    if rules.proxy is not None and rules.proxy.trusts(context):
        metadata = _texts(context)
        given = fairness_id(metadata)
        turn, priority = f"fairness {given}" if given else "", priority_of(metadata, rules.priorities)
    if identity is not None:  # an id that it claims changes nothing
        return Caller(
            owner=identity.share,
            share=identity.share,
            connection=peer,
            is_authenticated=True,
            turn=turn,
            priority=priority,
        )
    owner = _claimed_owner(context)
    share = UNIX if peer.startswith("unix:") else owner or f"address {_host_of(peer)}"
    return Caller(owner=owner, share=share, connection=peer, turn=turn, priority=priority)


def identity_of_peer(context: grpc.aio.ServicerContext) -> Identity | None:
    """Who calls, by a certificate that was checked in the handshake, or by the word of a trusted proxy; or None.

    Raises PermissionDenied for a certificate without a name.
    """
    proxy = _rules.get().proxy
    if proxy is not None and proxy.trusts(context):
        name = forwarded_name(_texts(context).get(CLIENT_CERTIFICATE, []))
        return Identity(name=name) if name else None
    name = next((name for name in peer_names(context) if NAME.fullmatch(name)), "")
    if not name and CERTIFICATE in context.auth_context():
        raise nameless()
    return Identity(name=name) if name else None


def _peer_of(context: grpc.aio.ServicerContext) -> str:
    """The peer with its port; calls by a Unix socket, which has none, get a number each."""
    peer = str(context.peer())
    return f"{peer}#{next(_calls)}" if peer.startswith("unix:") else peer


def _claimed_owner(context: grpc.aio.ServicerContext) -> str:
    """The owner by the id in the metadata; "" without one."""
    given = [value for key, value in context.invocation_metadata() or () if key == CLIENT_ID]
    if not given or given == [""]:
        return ""
    if len(given) > 1:
        raise InvalidRequest("it is given more than once", reason="BAD_CLIENT_ID", field=CLIENT_ID)
    name = given[0] if isinstance(given[0], str) else ""
    check_identifier(name, CLIENT_ID, reason="BAD_CLIENT_ID")
    return f"client {name}"


def _texts(context: grpc.aio.ServicerContext) -> dict[str, list[str]]:
    """The metadata of the call that is text, by key."""
    found: dict[str, list[str]] = {}
    for key, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            found.setdefault(key, []).append(value)
    return found


def _host_of(peer: str) -> str:
    """The address without the port; all callers of a Unix socket have one address."""
    kind, _, rest = peer.partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind
