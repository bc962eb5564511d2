"""The environment variables of this project, and warnings about names that are not among them."""

import difflib
import re
from collections.abc import Mapping

PREFIX = "STEERLLM_"

VARIABLES: Mapping[str, str] = {
    "STEERLLM_ADDRESS": "address on which `steer serve` listens, and that commands connect to: host:port or unix:/path",
    "STEERLLM_CACHE": "folder of all caches and of the converted bundled model",
    "STEERLLM_CAPTURE_METADATA": "0: captured rows come without labels",
    "STEERLLM_CLIENT_SHM_GB": "capture memory that one client may have at once, in GiB",
    "STEERLLM_CLIENT_VECTOR_BYTES": "bytes of stored vectors that one client may have",
    "STEERLLM_GRACE_S": "seconds that running requests get when the server stops",
    "STEERLLM_INSTANCE": "name of the server among those behind a balancer; empty: a random one",
    "STEERLLM_HEALTH_ADDRESS": "a further address, for health checks alone; empty: none",
    "STEERLLM_HEARTBEAT_S": "seconds without a response after which a response stream gets a heartbeat; 0: never",
    "STEERLLM_TRUSTED_PROXY": "peers that may name the client for which they call; empty: none",
    "STEERLLM_OBJECTIVES": "priorities of the objectives that such a peer may name, as NAME=PRIORITY, with commas",
    "STEERLLM_UDS_MODE": "permissions of a Unix socket, in octal",
    "STEERLLM_UDS_GROUP": "group of a Unix socket; empty: that of the process",
    "STEERLLM_INSECURE": "1: `steer serve` listens without TLS where other machines reach it",
    "STEERLLM_LAME_DUCK_S": "seconds for which a stopping server still accepts requests",
    "STEERLLM_LISTEN_WHEN_READY": "1: `steer serve` accepts connections once the model is ready, for TCP probes",
    "STEERLLM_LOG_FORMAT": "text or json: the form of the lines that `steer serve` logs",
    "STEERLLM_LOG_LEVEL": "debug, info, warning, error or critical: least level of the lines that `steer serve` logs",
    "STEERLLM_MAX_CLIENT_FETCHES": "captures that one client fetches at once",
    "STEERLLM_MAX_CLIENT_REQUESTS": "requests of one client that run or wait at once; 0: no limit of its own",
    "STEERLLM_MAX_CLIENT_SESSIONS": "shared-memory sessions that one client has at once",
    "STEERLLM_MAX_CONCURRENT_REQUESTS": "requests that run or wait at once; more are refused",
    "STEERLLM_MAX_DEADLINE_S": "seconds that a request may take at most",
    "STEERLLM_MAX_MESSAGE_BYTES": "largest request, in bytes",
    "STEERLLM_MAX_QUEUED_BYTES": "bytes of requests that wait at once",
    "STEERLLM_MAX_QUEUED_TOKENS": "prompt tokens of requests that wait at once, estimated",
    "STEERLLM_MAX_RESTARTS": "restarts of a dead engine within the restart window; then the server exits",
    "STEERLLM_MAX_RUNNING_REQUESTS": "requests that the engine has at once; 0: a few more than it computes",
    "STEERLLM_MAX_SHM_GB": "capture memory of all clients, in GiB",
    "STEERLLM_METRICS_HOST": "interface of the metrics port",
    "STEERLLM_METRICS_PORT": "port on which Prometheus reads metrics; 0: none",
    "STEERLLM_OTLP_TRACES_ENDPOINT": "where OpenTelemetry's spans are sent over OTLP; empty: nowhere",
    "STEERLLM_PREFIX_ISOLATION": "auto, client or none: whether clients reuse each other's prompts",
    "STEERLLM_RESTART_WINDOW_S": "seconds for which a restart of the engine is counted",
    "STEERLLM_RETRY_AFTER_S": "delay after which refused clients should retry, in seconds",
    "STEERLLM_SEND_TIMEOUT_S": "seconds after which a response stream without a reader is closed; 0: never",
    "STEERLLM_SHARED_MEMORY": "0: the server delivers no captures in shared memory",
    "STEERLLM_SHM_DIR": "in-memory directory of captures",
    "STEERLLM_SHM_GROUP": "group that may read captures in shared memory",
    "STEERLLM_SHM_MODE": "permissions of captures in shared memory, in octal",
    "STEERLLM_SHM_TTL": "seconds after its last use at which a held capture or a lease expires",
    "STEERLLM_STEP_TIMEOUT_S": "seconds without a completed step after which the engine hangs; 0: by its steps",
    "STEERLLM_TLS_CERT": "PEM file: certificate of `steer serve`",
    "STEERLLM_TLS_CLIENT_CA": "PEM file: authorities of the certificates of clients",
    "STEERLLM_TLS_KEY": "PEM file: private key of the certificate",
    "STEERLLM_TOKEN_FILE": "TOML file: clients and the SHA-256 of their bearer tokens",
    "STEERLLM_VECTOR_STORE_BYTES": "bytes of stored vectors of all clients; 0: vectors are not stored",
}
"""Variable -> its meaning; every variable that the product reads."""

RENAMED: Mapping[str, str] = {"STEERLLM_STALL_S": "STEERLLM_SEND_TIMEOUT_S"}
"""Former name -> the variable of today."""

TEST_PREFIX = "STEERLLM_TEST_"
"""The test suite's own variables begin with it; they reach the commands that tests start."""


_OF_A_SERVICE = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_PLACE = re.compile("(tcp|udp|sctp)://")


def unknown_variable_warnings(environment: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each variable of `environment` that begins with STEERLLM_ and is not known, by name."""
    unknown = [name for name in environment if name.startswith(PREFIX) and name not in VARIABLES]
    return [
        _warning(name)
        for name in sorted(unknown)
        if not name.startswith(TEST_PREFIX) and not is_service_link(name, environment[name])
    ]


def is_service_link(name: str, value: str) -> bool:
    """True for a variable that Kubernetes sets in every pod for a Service whose name begins with `steerllm`."""
    return bool(_OF_A_SERVICE.fullmatch(name) or (name.endswith("_PORT") and _PLACE.match(value)))


def _warning(name: str) -> str:
    close = _closest(name)
    return f"{name} is not a known variable" + (f"; did you mean {close}?" if close else "")


def _closest(name: str) -> str | None:
    # The prefix is left out: all names share it, so every name would be close to some other.
    candidates = {known.removeprefix(PREFIX): known for known in VARIABLES}
    candidates |= {former.removeprefix(PREFIX): today for former, today in RENAMED.items()}
    matches = difflib.get_close_matches(name.removeprefix(PREFIX).upper(), candidates, n=1)
    return candidates[matches[0]] if matches else None
