"""Which HTTP proxy gRPC takes for an address, and which environment variable says so: for the texts of errors."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from steer_service.wire.channels import is_this_machine

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Those that gRPC reads, the first that is set; it reads no others and ignores those in capital letters."""

EXCEPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")
"""Those with the hosts that need no proxy, likewise."""


@dataclass(frozen=True, slots=True)
class HttpProxy:
    """A proxy that an environment variable names."""

    variable: str
    """The variable."""
    address: str
    """Its host and port, without the user and the password."""

    def __str__(self) -> str:
        return f"the HTTP proxy {self.address} of {self.variable}"


def proxy_for(
    address: str, channel_options: Mapping[str, str | int], environment: Mapping[str, str] = os.environ
) -> HttpProxy | None:
    """The proxy through which a channel to `address` connects; None if it connects directly."""
    enabled = channel_options.get("grpc.enable_http_proxy", 0 if is_this_machine(address) else 1)
    variable = next((name for name in PROXY_VARIABLES if environment.get(name)), None)
    if not enabled or variable is None or address.startswith("unix:"):
        return None
    url = urlsplit(environment[variable])
    host = address.removeprefix("dns:").lstrip("/").rpartition(":")[0].strip("[]")
    if url.scheme != "http" or _needs_none(host, environment):
        return None
    return HttpProxy(variable, url.netloc.rpartition("@")[2])


def _needs_none(host: str, environment: Mapping[str, str]) -> bool:
    named = next((environment[name] for name in EXCEPTION_VARIABLES if environment.get(name)), "")
    return any(host.endswith(suffix) for entry in named.split(",") if (suffix := entry.strip()))
