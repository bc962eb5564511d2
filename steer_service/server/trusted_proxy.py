"""Which peers are proxies whose word counts, and what they say of the client that they speak for.

Such a proxy has checked the client's certificate. It sends the name in `x-forwarded-client-cert`, the header of Envoy
and of meshes that are made of it. From any other peer that header means nothing.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import grpc

from steer_service.core.errors import InvalidRequest, PermissionDenied
from steer_service.core.field_checks import IDENTIFIER

CLIENT_CERTIFICATE = "x-forwarded-client-cert"
"""Metadata key of the client's certificate, as the proxy saw it."""

FAIRNESS_ID = "x-gateway-inference-fairness-id"
"""Metadata key of whose turn in the queue a request takes, set by gateways of the Gateway API's inference extension."""

OBJECTIVE = "x-gateway-inference-objective"
"""Metadata key of the objective of a request, likewise; the server's settings give it a priority."""

PEER_NAMES = ("x509_subject_alternative_name", "x509_common_name")
"""gRPC's keys of the names in a certificate, which it has for peers with a certificate alone."""

SPIFFE = "spiffe://"

NAME = re.compile(r"[!-}](?:[ -~]{0,254}[!-~])?")
"""Names that certificates may have here: 1..256 printable characters of ASCII. In logs, `~` begins a hash."""

MOST_HEADER = 16384
"""Characters of the header at most: what gRPC accepts of metadata."""

COMMON_NAME = "CN="

PREFERRED = ("uri", "dns", "subject")
"""Keys of an element that name the client, the best first."""

BY_CERTIFICATE = "certificate:"
"""Begins an entry of the setting that names a proxy by its own certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedProxy:
    """The peers that are trusted."""

    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    """Their addresses."""
    names: frozenset[str] = frozenset()
    """Names in their certificates."""
    is_unix: bool = False
    """True if peers that use a Unix socket are."""

    def trusts(self, context: grpc.aio.ServicerContext) -> bool:
        """True if the call comes from such a peer."""
        kind, _, rest = context.peer().partition(":")
        if kind == "unix" and self.is_unix:
            return True
        if self.names and self.names.intersection(peer_names(context)):
            return True
        if kind not in ("ipv4", "ipv6") or not self.networks:
            return False
        host = unquote(rest).rpartition(":")[0].removeprefix("[").removesuffix("]")  # gRPC escapes the brackets
        address = ipaddress.ip_address(host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self.networks)


def trusted_proxy(text: str) -> TrustedProxy | None:
    """The peers of the setting `trusted_proxy`; None for none. Raises InvalidRequest."""
    networks, names, is_unix = [], set(), False
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if entry == "loopback":
            networks += [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
        elif entry == "unix":
            is_unix = True
        elif entry.startswith(BY_CERTIFICATE) and NAME.fullmatch(entry.removeprefix(BY_CERTIFICATE)):
            names.add(entry.removeprefix(BY_CERTIFICATE))
        else:
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                raise InvalidRequest(
                    f"{entry!r} is not `loopback`, `unix`, an address or a network such as 10.0.0.0/24, or "
                    "`certificate:NAME`",
                    field="trusted_proxy",
                ) from None
    if not networks and not names and not is_unix:
        return None
    return TrustedProxy(networks=tuple(networks), names=frozenset(names), is_unix=is_unix)


def peer_names(context: grpc.aio.ServicerContext) -> list[str]:
    """The names in the peer's certificate, which was checked in the handshake; a SPIFFE id comes first."""
    auth = context.auth_context()
    names = [name.decode(errors="replace") for key in PEER_NAMES for name in auth.get(key, ())]
    return sorted(names, key=lambda name: not name.startswith(SPIFFE))


def forwarded_name(values: Iterable[str | bytes]) -> str:
    """The client's name in `x-forwarded-client-cert`; "" if there is no header, or it is empty.

    Each proxy on the way appends an element about the peer that it saw: the last one is what the trusted proxy says.
    Raises PermissionDenied for a header that is not well-formed, or whose last element has no name: nobody is to be
    taken for another client, or for none.
    """
    header = ",".join(value for value in values if isinstance(value, str) and value)
    if not header:
        return ""
    elements = _elements(header)
    last = elements[-1] if elements else []
    uris, dns, subjects = ([value for key, value in last if key == wanted and value] for wanted in PREFERRED)
    spiffe = [uri for uri in uris if uri.startswith(SPIFFE)]
    name = next(iter([*spiffe, *uris, *dns, *map(_common_name, subjects)]), "")
    if not NAME.fullmatch(name):
        raise nameless()
    return name


def nameless() -> PermissionDenied:
    """The error of a client whose certificate names nobody."""
    return PermissionDenied("the certificate of this client has no name that this server can use")


def _elements(header: str) -> list[list[tuple[str, str]]]:
    """The keys and values of each element; [] if the header is not well-formed.

    Elements stand between commas and pairs between semicolons. A quoted value is quoted as a whole.
    """
    if len(header) > MOST_HEADER:
        return []
    elements: list[list[tuple[str, str]]] = [[]]
    place, end = 0, len(header)
    while place < end:
        equals = header.find("=", place)
        key = header[place:equals].strip().lower() if equals >= 0 else ""
        if not key.isalpha():
            return []
        place = equals + 1
        if header[place : place + 1] == '"':
            value, place = _quoted(header, place + 1)
            if place < 0:
                return []
        else:
            start = place
            while place < end and header[place] not in ';,"':
                place += 1
            value = header[start:place]
        elements[-1].append((key, value))
        if place < end:
            if header[place] not in ";,":
                return []
            if header[place] == ",":
                elements.append([])
            place += 1
    return elements


def _quoted(header: str, place: int) -> tuple[str, int]:
    """The value that begins at `place`, with its escapes, and the place after its quote; -1 if there is none."""
    start = place
    while place < len(header) and header[place] != '"':
        place += 2 if header[place] == "\\" else 1
    return header[start:place].replace('\\"', '"'), place + 1 if place < len(header) else -1


def _common_name(subject: str) -> str:
    """The only common name of a subject in the form of RFC 2253; "" if there is none, or more than one."""
    parts, place = [""], 0
    while place < len(subject):
        if subject[place] == "\\":
            parts[-1] += subject[place : place + 2]
            place += 2
            continue
        if subject[place] in ",+":
            parts.append("")
        else:
            parts[-1] += subject[place]
        place += 1
    names = [part.strip().removeprefix(COMMON_NAME) for part in parts if part.strip().startswith(COMMON_NAME)]
    return names[0] if len(names) == 1 and "\\" not in names[0] else ""


def fairness_id(metadata: Mapping[str, list[str]]) -> str:
    """Whose turn the request takes; "" if the proxy does not say, or not with a valid id."""
    given = metadata.get(FAIRNESS_ID, [])
    return given[0] if len(given) == 1 and IDENTIFIER.fullmatch(given[0]) else ""


def priority_of(metadata: Mapping[str, list[str]], priorities: Mapping[str, int]) -> int | None:
    """The priority of the request's objective; None if the proxy names none that has one."""
    given = metadata.get(OBJECTIVE, [])
    return priorities.get(given[0]) if len(given) == 1 else None


def objective_priorities(text: str) -> dict[str, int]:
    """The setting `objectives`, such as `chat=0,batch=10`, as objective -> priority. Raises InvalidRequest."""
    found: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = entry.partition("=")
        if not IDENTIFIER.fullmatch(name) or not re.fullmatch(r"-?\d{1,9}", number) or name in found:
            raise InvalidRequest(f"{entry!r} is not NAME=PRIORITY, such as batch=10", field="objectives")
        found[name] = int(number)
    return found
