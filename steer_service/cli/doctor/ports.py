"""The addresses to listen on, and whether they are free."""

from collections.abc import Callable, Iterator
from functools import cache

from steer_service.cli.doctor.findings import Finding, Status, fail, ok, warn
from steer_service.cli.healthcheck import asks_for_tls, is_answered
from steer_service.core.errors import SteerError
from steer_service.server.bind import address_of, check_free, check_not_exposed
from steer_service.server.config import ServerConfig


def check_ports(config: ServerConfig) -> Iterator[Finding]:
    """The main address, that of health checks and the metrics port.

    A server that already runs here is no failure: `steer doctor` may run beside it, in its container.
    """
    is_running = cache(lambda: _is_running(config))
    main = _checked("address", config.address, "--host and --port, or STEERLLM_ADDRESS", is_running)
    yield main
    if main.status is not Status.FAIL and config.certificates is None and not config.insecure:
        try:
            check_not_exposed(config.address)
        except SteerError as error:
            yield fail("address", error.message)
    if config.health_address:
        option = "--health-address, or STEERLLM_HEALTH_ADDRESS"
        yield _checked("health address", config.health_address, option, is_running)
    if config.metrics_port:
        address = address_of(config.metrics_host, config.metrics_port)
        option = "--metrics-port, or STEERLLM_METRICS_PORT"
        yield _checked("metrics port", address, option, is_running)


def _is_running(config: ServerConfig) -> bool:
    if config.health_address and is_answered(config.health_address):  # has no TLS
        return True
    return is_answered(config.address) or (config.certificates is not None and asks_for_tls(config.address))


def _checked(check: str, address: str, option: str, is_running: Callable[[], bool]) -> Finding:
    try:
        check_free(address)
    except SteerError as error:
        if error.reason == "ADDRESS_UNAVAILABLE" and is_running():
            return warn(check, f"{address} is taken, and a steer server runs here; another one needs {option}")
        if error.reason != "ADDRESS_UNAVAILABLE":
            return fail(check, f"{error.message}; set {option}")
        return fail(
            check, f"{error.message}; end what has it, which `ss -ltnp` shows, or choose another address with {option}"
        )
    return ok(check, f"{address} is free")
