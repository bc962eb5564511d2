"""The flags of `steer serve` that are the server's own, one for each setting, and the settings that they give."""

import argparse
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from steer_service.cli.logs import add_log_arguments
from steer_service.core.environment import PREFIX
from steer_service.core.errors import InvalidRequest
from steer_service.core.setting_rules import NUMBERS, PREFIX_ISOLATION, gib_from
from steer_service.server.bind import UNIX, address_of, host_and_port
from steer_service.server.config import ServerConfig
from steer_service.server.trace_endpoint import traces_endpoint

SHARED_WITH_ENGINE = ("shm_dir", "shm_mode", "shm_group")
"""Settings that the server and its engine share; the engine's argument begins with `steer_`, and it adds the flags."""

LOGS = "metrics and logs"
"""The title of the group that has the flags of the log."""

BYTES, COUNT, SECONDS, PATH, NAME = "BYTES", "N", "S", "PATH", "NAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """The flag of one setting of ServerConfig."""

    metavar: str
    """What its value is; "" for a flag without a value."""
    help: str
    """What it does; the default is added unless it is empty or 0."""
    name: str = ""
    """The flag; by default that of the setting's name, without `_s`."""
    value: int = 1
    """The value that a flag without one gives."""


GROUPS: Mapping[str, Mapping[str, Flag]] = {
    "addresses": {
        "health_address": Flag(metavar="ADDRESS", help="a further address that serves health checks alone"),
        "listen_when_ready": Flag(metavar="", help="accept connections only once the model is ready, for TCP probes"),
        "instance": Flag(metavar=NAME, help="name among several servers: host:port, as their balancer reaches it"),
        "uds_mode": Flag(metavar="OCTAL", help="permissions of the Unix socket"),
        "uds_group": Flag(metavar="GROUP", help="group of the Unix socket (default: this process's)"),
    },
    "clients and encryption": {
        "token_file": Flag(metavar=PATH, help="TOML file with the clients' bearer tokens, see `steer token`"),
        "tls_cert": Flag(metavar=PATH, help="PEM file: certificate for TLS"),
        "tls_key": Flag(metavar=PATH, help="PEM file: its private key"),
        "tls_client_ca": Flag(metavar=PATH, help="PEM file: authorities of clients' certificates, then required"),
        "trusted_proxy": Flag(
            metavar="WHO", help="peers that may name their clients: loopback, unix, networks, certificate:NAME"
        ),
        "objectives": Flag(metavar="LIST", help="priorities that such a peer may ask for by name: chat=0,batch=10"),
        "insecure": Flag(metavar="", help="listen without TLS on an address that other machines reach"),
        "prefix_isolation": Flag(metavar="", help="whether clients reuse each other's prompts in the prefix cache"),
    },
    "limits": {
        "max_message_bytes": Flag(metavar=BYTES, help="most bytes of a request"),
        "max_concurrent_requests": Flag(metavar=COUNT, help="most requests that run or wait"),
        "max_running_requests": Flag(metavar=COUNT, help="most requests in the engine (default: what it computes)"),
        "max_client_requests": Flag(metavar=COUNT, help="most requests of one client (default: no limit)"),
        "max_client_fetches": Flag(metavar=COUNT, help="most captures that one client fetches at once"),
        "max_client_sessions": Flag(metavar=COUNT, help="most shared-memory sessions of one client"),
        "max_queued_bytes": Flag(metavar=BYTES, help="most bytes of waiting requests"),
        "max_queued_tokens": Flag(metavar=COUNT, help="most prompt tokens of waiting requests"),
        "vector_store_bytes": Flag(metavar=BYTES, help="memory for stored steering vectors; 0: none are stored"),
        "client_vector_bytes": Flag(metavar=BYTES, help="the share of one client"),
    },
    "times": {
        "grace_s": Flag(metavar=SECONDS, help="time for requests to finish after a signal"),
        "lame_duck_s": Flag(metavar=SECONDS, help="time after a signal in which requests are still accepted"),
        "max_deadline_s": Flag(metavar=SECONDS, help="longest time of a request"),
        "retry_after_s": Flag(metavar=SECONDS, help="when a refused client should try again"),
        "send_timeout_s": Flag(metavar=SECONDS, help="close a response stream that is not read for so long; 0: never"),
        "heartbeat_s": Flag(metavar=SECONDS, help="longest silence of a response stream; 0: any"),
    },
    "restarts of the engine": {
        "max_restarts": Flag(metavar=COUNT, help="most restarts within --restart-window; then the server exits"),
        "restart_window_s": Flag(metavar=SECONDS, help="time for which a restart is counted"),
        "step_timeout_s": Flag(metavar=SECONDS, help="time without a step after which it hangs (default: 60 or more)"),
    },
    LOGS: {
        "metrics_port": Flag(metavar=COUNT, help="HTTP port of metrics, /health and /ready (default: none)"),
        "metrics_host": Flag(metavar="HOST", help="interface of that port"),
        "otlp_traces_endpoint": Flag(metavar="URL", help="where OpenTelemetry's spans are sent (default: nowhere)"),
    },
    "captures in shared memory": {
        "shared_memory": Flag(name="--no-shared-memory", metavar="", value=0, help="never hand out shared memory"),
        "shm_ttl": Flag(metavar=SECONDS, help="time after its last use for which a capture is kept"),
    },
}
"""Title -> setting -> its flag. The address and `SHARED_WITH_ENGINE` have flags of their own."""

ENGINE_VARIABLES: Mapping[str, Flag] = {
    "max_shm_gb": Flag(metavar="GIB", help="most shared memory for captures (default: 128)"),
    "client_shm_gb": Flag(metavar="GIB", help="the share of one client (default: a quarter)"),
    "capture_metadata": Flag(name="--no-capture-metadata", metavar="", value=0, help="send captured rows unlabelled"),
}
"""Variable that the engine itself reads, without its prefix -> its flag, which sets the variable."""

TRACES = "otlp_traces_endpoint"
"""The setting whose flag is vLLM's; the spans of both go there."""

ADDRESS_FIELDS = ("address", "health_address")


def flag_of(setting: str, flag: Flag) -> str:
    """The flag of a setting."""
    return flag.name or "--" + setting.removesuffix("_s").replace("_", "-")


def add_server_arguments(parser: argparse.ArgumentParser, defaults: ServerConfig, *, beside_vllms: bool) -> None:
    """Adds the flags, in groups. `beside_vllms`: the parser has vLLM's flags already."""
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        if title == "addresses":
            group.add_argument("--host", help="interface to listen on, or unix:/path (default: 127.0.0.1)")
            group.add_argument("--port", type=int, help="port to listen on; 0 chooses a free one (default: 50051)")
            group.add_argument("--uds", metavar=PATH, help="Unix socket to listen on instead")
        for setting, flag in flags.items():
            if not (beside_vllms and setting == TRACES):
                _add(group, setting, flag, getattr(defaults, setting))
        if title == LOGS:
            add_log_arguments(group, defaults)
    for variable, flag in ENGINE_VARIABLES.items():
        _add(group, variable, flag, None)


def set_shared_defaults(parser: argparse.ArgumentParser) -> None:
    """Makes the variables of this project the defaults of flags that the engine or vLLM has added."""
    defaults = ServerConfig.from_environment()
    engines = {"steer_" + name: getattr(defaults, name) for name in SHARED_WITH_ENGINE}
    parser.set_defaults(**{TRACES: getattr(defaults, TRACES)}, **engines)


def config_from(namespace: argparse.Namespace) -> ServerConfig:
    """The settings of the flags and the environment.

    Raises InvalidRequest, whose field is the flag or the variable, for those that are not valid.
    """
    try:
        return _config_from(namespace, ServerConfig.from_environment())
    except InvalidRequest as error:
        error.field = source_of(error.field, namespace)
        raise


def set_engine_variables(namespace: argparse.Namespace, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables of `ENGINE_VARIABLES` whose flags were given: the engine reads them when it starts."""
    for name in ENGINE_VARIABLES:
        if getattr(namespace, name) is not None:
            environment[PREFIX + name.upper()] = str(getattr(namespace, name))


def _config_from(namespace: argparse.Namespace, config: ServerConfig) -> ServerConfig:
    given = {setting: getattr(namespace, setting) for flags in GROUPS.values() for setting in flags}
    given |= {name: getattr(namespace, "steer_" + name) for name in SHARED_WITH_ENGINE}
    given[TRACES] = traces_endpoint(given[TRACES] or "")
    config = replace(
        config,
        **given,
        address=_address_from(namespace, config.address),
        log_level=namespace.server_log_level or config.log_level,
        log_format=namespace.log_format,
    )
    for name in ADDRESS_FIELDS:
        address = getattr(config, name)
        if address and not address.startswith(UNIX):
            host_and_port(address, name)
    _ = config.segments
    return config


def source_of(setting: str, namespace: argparse.Namespace) -> str:
    """Where a setting that is not valid comes from: its variable or its flag."""
    variable = PREFIX + setting.upper()
    flags = {name: flag_of(name, flag) for group in GROUPS.values() for name, flag in group.items()}
    flags |= {name: "--" + name.replace("_", "-") for name in SHARED_WITH_ENGINE}
    if setting == "address":
        is_flag = (namespace.host, namespace.port, namespace.uds) != (None, None, None)
        return "--host, --port, --uds" if is_flag else variable
    value = getattr(namespace, "steer_" + setting if setting in SHARED_WITH_ENGINE else setting, None)
    if setting not in flags or (variable in os.environ and os.environ[variable] == str(value)):
        return variable if variable in os.environ else setting
    return flags[setting]


def _address_from(namespace: argparse.Namespace, default: str) -> str:
    if namespace.uds:
        return UNIX + str(namespace.uds)
    if namespace.host is not None and namespace.host.startswith(UNIX):
        return str(namespace.host)
    if namespace.host is None and namespace.port is None:
        return default
    host, port = ("127.0.0.1", 50051) if default.startswith(UNIX) else host_and_port(default)
    return address_of(
        host if namespace.host is None else namespace.host, port if namespace.port is None else namespace.port
    )


def _add(group: argparse._ArgumentGroup, setting: str, flag: Flag, default: Any) -> None:
    name = flag_of(setting, flag)
    shown = (
        ""
        if "default" in flag.help or not default
        else f" (default: %(default){'g' if isinstance(default, float) else 's'})"
    )
    if setting == "prefix_isolation":
        group.add_argument(name, choices=PREFIX_ISOLATION, default=default, help=flag.help + shown)
    elif not flag.metavar:
        group.add_argument(name, dest=setting, action="store_const", const=flag.value, default=default, help=flag.help)
    else:
        kind = _gib if setting in ENGINE_VARIABLES else NUMBERS[setting].kind if setting in NUMBERS else str
        group.add_argument(name, dest=setting, metavar=flag.metavar, type=kind, default=default, help=flag.help + shown)


def _gib(text: str) -> float:
    try:
        return gib_from("", text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(error.message) from error
