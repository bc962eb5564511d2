"""The files of deploy/envoy, as they are shipped: Envoy accepts them, and they agree with each other."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import Issue
from tests.deploy.fleet import DEPLOY, Config, Places, adapt, find_envoy, shipped

BOOTSTRAPS = ("edge.yaml", "edge_mtls.yaml", "sidecar.yaml")


def connection_manager(config: Config) -> Config:
    filters = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    return dict(filters[0]["typed_config"])


def routes(config: Config) -> list[Config]:
    [host] = connection_manager(config)["route_config"]["virtual_hosts"]
    return list(host["routes"])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document with its place."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


VARIANTS = [(name, variant) for name in BOOTSTRAPS for variant in ("as it is shipped", "without TLS")]
VARIANTS += [(name, "with TLS to the replicas") for name in ("edge.yaml", "edge_mtls.yaml")]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_envoy_accepts_the_file_without_a_warning(name: str, variant: str, issue: Issue, tmp_path: Path) -> None:
    config = shipped(name, with_blocks=variant == "with TLS to the replicas")
    certificates = None if variant == "without TLS" else issue("a")
    adapted = adapt(config, Places(host="127.0.0.1", replicas=["127.0.0.1:1"], certificates=certificates), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(adapted))

    command = [str(find_envoy()), "--mode", "validate", "--log-level", "warning", "-c", str(tmp_path / "config.json")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (answer.returncode, answer.stderr) == (0, "")


def test_secrets_have_the_names_that_are_asked_for() -> None:
    for bootstrap in BOOTSTRAPS:
        for path, file in leaves(shipped(bootstrap, with_blocks=True)):
            if path.endswith("/path_config_source/path"):
                asked = dict(leaves(shipped(bootstrap, with_blocks=True)))[path.split("/sds_config/")[0] + "/name"]
                assert [secret["name"] for secret in shipped(Path(file).name)["resources"]] == [asked]


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_no_limit_on_the_time_of_a_response_cuts_it(name: str) -> None:
    config = shipped(name)
    assert routes(config)
    for route in routes(config):
        assert route["route"]["timeout"] == "0s"
        assert "max_stream_duration" not in route["route"]
    http = connection_manager(config)
    assert "request_timeout" not in http
    assert not {"max_stream_duration", "max_connection_duration"} & set(http["common_http_protocol_options"])
    heartbeat_s = 15  # the default of STEERLLM_HEARTBEAT_S
    assert float(http["stream_idle_timeout"].rstrip("s")) >= 10 * heartbeat_s


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_the_admin_port_is_on_the_loopback_address(name: str) -> None:
    assert shipped(name)["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_the_access_log_has_no_secret(name: str) -> None:
    [log] = connection_manager(shipped(name))["access_log"]
    logged = json.dumps(log["typed_config"]["log_format"]["json_format"]).lower()
    assert not any(word in logged for word in ("authorization", "steer-client-id", "client-cert", "cookie"))


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_no_filter_buffers(name: str) -> None:
    names = [one["name"] for one in connection_manager(shipped(name))["http_filters"]]
    known = {"cors", "grpc_web", "stateful_session", "router"}
    assert {name.removeprefix("envoy.filters.http.") for name in names} <= known


def test_the_edge_with_client_certificates_differs_in_nothing_else() -> None:
    plain, mutual = dict(leaves(shipped("edge.yaml"))), dict(leaves(shipped("edge_mtls.yaml")))
    differing = {path for path in plain.keys() | mutual.keys() if plain.get(path) != mutual.get(path)}
    chain = "/static_resources/listeners/0/filter_chains/0"
    context = f"{chain}/transport_socket/typed_config"
    http = f"{chain}/filters/0/typed_config"
    allowed = (
        f"{context}/require_client_certificate",
        f"{context}/common_tls_context/combined_validation_context",
        f"{http}/forward_client_cert_details",
        f"{http}/set_current_client_cert_details",
        f"{http}/access_log/0/typed_config/log_format/json_format/certificate",
    )
    assert {path for path in differing if not path.startswith(allowed)} == set()
    assert mutual[f"{context}/require_client_certificate"] is True
    assert (plain[f"{http}/forward_client_cert_details"], mutual[f"{http}/forward_client_cert_details"]) == (
        "SANITIZE",
        "SANITIZE_SET",
    )


def test_the_sidecar_has_the_limits_of_the_edge() -> None:
    edge, sidecar = connection_manager(shipped("edge.yaml")), connection_manager(shipped("sidecar.yaml"))
    own = {"stat_prefix", "forward_client_cert_details", "set_current_client_cert_details", "http_filters"}
    for key in sidecar.keys() - own - {"route_config"}:
        assert sidecar[key] == edge[key], key
    clusters = [shipped(name)["static_resources"]["clusters"][0] for name in ("edge.yaml", "sidecar.yaml")]
    for key in ("circuit_breakers", "typed_extension_protocol_options", "per_connection_buffer_limit_bytes"):
        assert clusters[0][key] == clusters[1][key]


def test_every_value_to_change_is_marked() -> None:
    for name in (*BOOTSTRAPS, "certificate.yaml", "authorities.yaml"):
        for line in (DEPLOY / name).read_text().splitlines():
            if "/etc/envoy/" in line and not line.strip().startswith("#"):
                assert "CHANGE" in line, f"{name}: {line}"


def test_the_blocks_that_are_commented_out_are_yaml() -> None:
    for name in ("edge.yaml", "edge_mtls.yaml"):
        assert "transport_socket" not in shipped(name)["static_resources"]["clusters"][0]
        assert "transport_socket" in shipped(name, with_blocks=True)["static_resources"]["clusters"][0]
    yaml.safe_load((DEPLOY / "sidecar.yaml").read_text())
