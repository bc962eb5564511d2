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

from steer_service.core.errors import InvalidRequest
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

NAME = re.compile(r"[!-~](?:[ -~]{0,254}[!-~])?")
"""Names that certificates may have here: 1..256 printable characters of ASCII."""

ELEMENT = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')
PAIR = re.compile(r'\s*([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^;"]*)\s*(?:;|$)')
"""Parts of the header: elements between commas, in each of them pairs between semicolons; values may be quoted."""

COMMON_NAME = re.compile(r"(?:^|,)CN=([^,]+)")

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
    """The client's name in `x-forwarded-client-cert`; "" if there is none.

    Each proxy on the way appends an element about the peer that it saw: the last one is what the trusted proxy says.
    """
    elements = [element for value in values if isinstance(value, str) for element in ELEMENT.findall(value)]
    if not elements:
        return ""
    pairs: dict[str, list[str]] = {}
    for key, value in PAIR.findall(elements[-1]):
        pairs.setdefault(key.lower(), []).append(re.sub(r"\\(.)", r"\1", value[1:-1]) if value[:1] == '"' else value)
    found = [value for key in PREFERRED for value in pairs.get(key, ())]
    named = next((value for value in found if value.startswith(SPIFFE)), found[0] if found else "")
    subject = COMMON_NAME.search(named) if named in pairs.get("subject", ()) else None
    name = subject.group(1) if subject else named
    return name if NAME.fullmatch(name) else ""


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
