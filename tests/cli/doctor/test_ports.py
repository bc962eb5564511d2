"""Addresses that are free, taken, or those of a server that runs already."""

import socket

from steer_service.cli.doctor.ports import check_ports
from steer_service.server.config import ServerConfig
from tests.cli.doctor.found import by_check, only
from tests.client.conftest import Serve, serve, short_folder  # noqa: F401  (fixtures)
from tests.real_server.serving import free_port


def test_a_free_address_is_fine() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert only(check_ports(ServerConfig(address=address))) == ("ok", f"{address} is free")
    assert only(check_ports(ServerConfig(address="127.0.0.1:0")))[0] == "ok"


def test_a_taken_address_fails_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServerConfig(address=f"127.0.0.1:{port}", metrics_port=port, health_address=f"127.0.0.1:{port}")
        found = by_check(check_ports(config))
    assert {check: status for check, (status, _) in found.items()} == {
        "address": "fail",
        "health address": "fail",
        "metrics port": "fail",
    }
    for check, option in (("address", "--port"), ("health address", "--health-address"), ("metrics port", "--metrics")):
        assert "Address already in use; end what has it, which `ss -ltnp` shows" in found[check][1]
        assert option in found[check][1]


def test_beside_a_running_server_a_taken_address_is_a_warning(serve: Serve, short_folder: str) -> None:  # noqa: F811
    for address in ("127.0.0.1:0", f"unix:{short_folder}/s"):
        running = serve(address=address).address
        status, text = only(check_ports(ServerConfig(address=running)))
        assert (status, text.partition(";")[0]) == ("warn", f"{running} is taken, and a steer server runs here")


def test_an_address_that_other_machines_reach_needs_tls() -> None:
    address = f"0.0.0.0:{free_port()}"
    found = list(check_ports(ServerConfig(address=address)))
    assert [str(finding.status) for finding in found] == ["ok", "fail"]
    assert "--insecure" in found[1].text
    assert only(check_ports(ServerConfig(address=address, insecure=1)))[0] == "ok"


def test_an_address_that_is_not_valid_fails() -> None:
    assert by_check(check_ports(ServerConfig(address="nonsense"))) == {
        "address": (
            "fail",
            "'nonsense' is neither host:port nor unix:/path; set --host and --port, or STEERLLM_ADDRESS",
        )
    }
