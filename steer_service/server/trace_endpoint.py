"""Where spans are sent, by a flag or by OpenTelemetry's own environment variables; imports none of it."""

import os
from collections.abc import MutableMapping

from steer_service.core.errors import InvalidRequest

FIELD = "otlp_traces_endpoint"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
SERVICE_NAME = "OTEL_SERVICE_NAME"
ATTRIBUTES = "OTEL_RESOURCE_ATTRIBUTES"

GRPC, HTTP = PROTOCOLS = ("grpc", "http/protobuf")

HTTP_PATH = "/v1/traces"
"""What OpenTelemetry adds to the endpoint of all signals for one of traces, over HTTP."""


def traces_endpoint(given: str, environment: MutableMapping[str, str] = os.environ) -> str:
    """The endpoint of `--otlp-traces-endpoint`, or else of the standard variables; "" if nothing is traced.

    With `OTEL_SDK_DISABLED=true` nothing is, also with the flag, which wins over `OTEL_TRACES_EXPORTER=none`.
    Raises InvalidRequest for a protocol that is not one of PROTOCOLS, or an endpoint that does not fit it.
    """
    endpoint, protocol = given, traces_protocol(environment)
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    if not endpoint and environment.get("OTEL_TRACES_EXPORTER") != "none":
        endpoint = environment.get(TRACES_ENDPOINT, "")
        if not endpoint and environment.get(ENDPOINT):
            endpoint = environment[ENDPOINT].rstrip("/") + (HTTP_PATH if protocol == HTTP else "")
    if not endpoint:
        return ""
    if protocol not in PROTOCOLS:
        raise InvalidRequest(f"{protocol!r} is not one of {', '.join(PROTOCOLS)}", field=TRACES_PROTOCOL)
    if protocol == HTTP and not endpoint.startswith(("http://", "https://")):
        raise InvalidRequest(f"{endpoint!r} is not a URL, which {HTTP} needs", field=FIELD)
    if not endpoint.isprintable() or " " in endpoint:
        raise InvalidRequest(f"{endpoint!r} is neither host:port nor a URL", field=FIELD)
    return endpoint


def traces_protocol(environment: MutableMapping[str, str] = os.environ) -> str:
    """How spans are sent: OpenTelemetry's variable for traces, or that for all signals; `grpc` by default."""
    return environment.get(TRACES_PROTOCOL) or environment.get(PROTOCOL) or GRPC


def share_with_engine(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets vLLM, which sends its own spans, name the same service and use the same protocol."""
    environment[TRACES_PROTOCOL] = traces_protocol(environment)
    if "service.name=" not in environment.get(ATTRIBUTES, ""):
        environment.setdefault(SERVICE_NAME, "steerllm")
