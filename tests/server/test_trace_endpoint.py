"""Where spans are sent: the flag, or OpenTelemetry's own variables with their standard meaning."""

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.server.trace_endpoint import share_with_engine, traces_endpoint

TRACES = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://traces:4317"}
ALL = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4317/"}
HTTP = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}


@pytest.mark.parametrize(
    ("given", "environment", "endpoint"),
    [
        ("", {}, ""),
        ("collector:4317", {}, "collector:4317"),
        ("collector:4317", {**TRACES, "OTEL_SDK_DISABLED": "true"}, ""),
        ("", TRACES, "http://traces:4317"),
        ("", {**TRACES, **ALL}, "http://traces:4317"),
        ("", ALL, "http://all:4317"),
        ("", {**ALL, **HTTP}, "http://all:4317/v1/traces"),
        ("", {**TRACES, **HTTP}, "http://traces:4317"),
        ("", {**TRACES, "OTEL_SDK_DISABLED": "TRUE"}, ""),
        ("", {**TRACES, "OTEL_TRACES_EXPORTER": "none"}, ""),
    ],
)
def test_the_flag_comes_first_and_then_the_variable_of_traces(
    given: str, environment: dict[str, str], endpoint: str
) -> None:
    assert traces_endpoint(given, environment) == endpoint


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ("c:1", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: 'http/json' is not"),
        ("c:1", HTTP, "otlp_traces_endpoint: 'c:1' is not a URL"),
        ("a b", {}, "otlp_traces_endpoint: 'a b' is neither host:port nor a URL"),
        ("a\n", {}, r"otlp_traces_endpoint: 'a\\n' is neither"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        traces_endpoint(given, environment)


@pytest.mark.parametrize(
    ("environment", "name"),
    [({}, "steerllm"), ({"OTEL_SERVICE_NAME": "mine"}, "mine"), ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=a"}, None)],
)
def test_the_engine_names_the_same_service(environment: dict[str, str], name: str | None) -> None:
    given = {**environment, **HTTP}
    share_with_engine(given)
    assert given.get("OTEL_SERVICE_NAME") == name
    assert given["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
