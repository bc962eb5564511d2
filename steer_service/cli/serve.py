"""`steer serve [MODEL]`: a server around vLLM until a signal comes."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.cli.logs import add_log_arguments, begin_log
from steer_service.core.backend import Backend
from steer_service.core.errors import SteerError
from steer_service.core.log_lines import log_event
from steer_service.core.processes import kill_descendants
from steer_service.server.app import SteerServer
from steer_service.server.bind import UNIX, address_of, host_and_port
from steer_service.server.client_limits import ClientLimits
from steer_service.server.config import PREFIX_ISOLATION, ServerConfig
from steer_service.server.event_loop import kept_heap, new_event_loop
from steer_service.server.supervisor import StartBackend, Supervisor
from steer_service.server.tokens import TokenFile
from steer_service.server.trace_endpoint import traces_endpoint
from steer_service.shm.instances import leave_all
from steer_service.shm.pool import SegmentPool

logger = logging.getLogger(__name__)

MODEL_DEPENDENT_DEFAULTS = ("enforce_eager", "gpu_memory_utilization")
"""Flags whose default depends on whether the model is the bundled one."""

SHARED_WITH_ENGINE = ("shm_dir", "shm_mode", "shm_group")
"""Options that the server and its engine share; the engine's argument begins with `steer_`."""

SECOND_SIGNAL_S = 4.0
"""Seconds after a second signal within which the server must have ended; then its processes are killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server's flags, and every engine flag of vLLM under its own name.

    Raises InvalidRequest for an environment variable that is not valid.
    """
    defaults = ServerConfig.from_environment()
    from steer_service.engine.config import add_engine_arguments, client_memory_budget, shared_memory_budget

    client_memory_budget(shared_memory_budget(), None)  # the engine reads them only after it has loaded the model
    parser.add_argument("checkpoint", metavar="MODEL", nargs="?", help="folder or name (default: the bundled model)")
    group = parser.add_argument_group("server")
    group.add_argument("--host", help="interface to listen on, or unix:/path (default: 127.0.0.1)")
    group.add_argument("--port", type=int, help="port to listen on; 0 chooses a free one (default: 50051)")
    group.add_argument("--uds", metavar="PATH", help="Unix socket to listen on instead")
    group.add_argument(
        "--instance",
        metavar="NAME",
        default=defaults.instance,
        help="name of this server among those behind a balancer: the host:port at which the balancer reaches it "
        "(default: random)",
    )
    group.add_argument(
        "--listen-when-ready",
        action="store_const",
        const=1,
        default=defaults.listen_when_ready,
        help="accept connections only once the model is ready, for TCP probes; without it, clients and health checks "
        "are told that the model loads",
    )
    group.add_argument(
        "--token-file",
        metavar="PATH",
        default=defaults.token_file,
        help="TOML file with the clients' bearer tokens, see `steer token`; every call then needs one",
    )
    group.add_argument("--tls-cert", metavar="PATH", default=defaults.tls_cert, help="PEM file: certificate for TLS")
    group.add_argument("--tls-key", metavar="PATH", default=defaults.tls_key, help="PEM file: its private key")
    group.add_argument(
        "--tls-client-ca",
        metavar="PATH",
        default=defaults.tls_client_ca,
        help="PEM file: authorities of clients' certificates; a client without one cannot connect",
    )
    group.add_argument(
        "--trusted-proxy",
        metavar="WHO",
        default=defaults.trusted_proxy,
        help="peers that may name the client for which they call, in x-forwarded-client-cert: loopback, unix, an "
        "address, a network, or certificate:NAME; several with commas (default: none)",
    )
    group.add_argument(
        "--uds-mode",
        metavar="OCTAL",
        default=defaults.uds_mode,
        help="permissions of the Unix socket: a user who may write to it may call (default: %(default)s)",
    )
    group.add_argument(
        "--uds-group",
        metavar="GROUP",
        default=defaults.uds_group,
        help="group of the Unix socket (default: this process's)",
    )
    group.add_argument(
        "--insecure",
        action="store_const",
        const=1,
        default=defaults.insecure,
        help="listen without TLS on an address that other machines reach, as behind the proxy of a mesh",
    )
    group.add_argument(
        "--grace",
        type=float,
        metavar="S",
        default=defaults.grace_s,
        help="seconds for requests to finish after a signal (default: %(default)s)",
    )
    group.add_argument(
        "--max-message-bytes",
        type=int,
        metavar="N",
        default=defaults.max_message_bytes,
        help="most bytes of a request (default: %(default)s)",
    )
    group.add_argument(
        "--max-concurrent-requests",
        type=int,
        metavar="N",
        default=defaults.max_concurrent_requests,
        help="most requests at a time (default: %(default)s)",
    )
    group.add_argument(
        "--prefix-isolation",
        choices=PREFIX_ISOLATION,
        default=defaults.prefix_isolation,
        help="whether clients reuse each other's prompts in the prefix cache (default: %(default)s)",
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        default=defaults.max_restarts,
        help="most restarts of a dead engine within --restart-window; then the server exits (default: %(default)s)",
    )
    group.add_argument(
        "--restart-window",
        type=float,
        metavar="S",
        default=defaults.restart_window_s,
        help="seconds for which a restart is counted (default: %(default)s)",
    )
    group.add_argument(
        "--step-timeout",
        type=float,
        metavar="S",
        default=defaults.step_timeout_s,
        help="seconds without a completed step, while requests run, after which the engine is killed and started again "
        "(default: 60, or ten times the longest step if that is more)",
    )
    group.add_argument(
        "--health-address",
        metavar="ADDRESS",
        default=defaults.health_address,
        help="a further address, host:port or unix:/path, that serves health checks alone; they answer at once there, "
        "however many calls arrive",
    )
    group.add_argument(
        "--metrics-port",
        type=int,
        metavar="N",
        default=defaults.metrics_port,
        help="HTTP port of the metrics for Prometheus, and of /health and /ready; 0 disables it (default: %(default)s)",
    )
    group.add_argument(
        "--metrics-host",
        metavar="HOST",
        default=defaults.metrics_host,
        help="interface of the metrics port (default: %(default)s)",
    )
    group.add_argument(
        "--no-shared-memory",
        dest="shared_memory",
        action="store_const",
        const=0,
        default=defaults.shared_memory,
        help="never hand out captures in shared memory",
    )
    add_engine_arguments(parser)
    add_log_arguments(group, defaults)
    # vLLM's default model is on a hub; None stands for a flag that was not given.
    parser.set_defaults(model=None, **dict.fromkeys(MODEL_DEPENDENT_DEFAULTS))
    parser.set_defaults(otlp_traces_endpoint=defaults.otlp_traces_endpoint)  # vLLM's flag, for spans of both
    parser.set_defaults(**{"steer_" + name: getattr(defaults, name) for name in SHARED_WITH_ENGINE})


def run(namespace: argparse.Namespace) -> int:
    """Serves until a signal comes or the engine dies too often; returns the exit status."""
    try:
        config = _config_from(namespace)
    except SteerError as error:
        print(f"steer: {error}", file=sys.stderr)
        return BAD_USAGE
    begin_log(config, namespace.server_log_level)
    try:
        tokens = TokenFile(config.token_file) if config.token_file else None
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(serve(config, EngineStart(namespace, config, tokens), tokens))
    except SteerError as error:
        if config.log_format == "text":
            print(f"steer: {error}", file=sys.stderr)
        else:
            log_event(logger, logging.CRITICAL, "failed", str(error), {"reason": error.reason})
        return FAILED


async def serve(config: ServerConfig, start: StartBackend, tokens: TokenFile | None = None) -> int:
    """Listens, starts the backend, serves and drains; returns the exit status.

    The first SIGTERM or SIGINT drains, at any time. The second ends all requests; if the process then does not end
    within `SECOND_SIGNAL_S`, it is killed with its children. The third kills at once. Raises the SteerError with which
    listening, the first start or the last of too many restarts fails.
    """
    server = SteerServer(config, tokens)
    with kept_heap(), _signals(server) as stop:
        try:
            address = await server.listen()
            if config.listen_when_ready:
                print(f"steer: {address} accepts connections once the model is ready", flush=True)
            else:
                print(f"steer: listening on {address}", flush=True)
            log_event(logger, logging.INFO, "listening", "", {"address": address})
            if server.health_address:
                print(f"steer: health checks on {server.health_address}", flush=True)
            await _supervise(server, start, stop)
        finally:
            await server.drain()
    return 0


async def _supervise(server: SteerServer, start: StartBackend, stop: asyncio.Event) -> None:
    """Runs the backend until a signal comes; raises the SteerError with which it cannot be run."""
    is_announced = not server.config.listen_when_ready

    def on_serving(backend: Backend) -> None:
        nonlocal is_announced
        if not is_announced:
            print(f"steer: listening on {server.address}", flush=True)
            is_announced = True
        if backend.start_proof is not None:
            print(f"steer: {backend.start_proof}", flush=True)
        print(f"steer: serving {backend.info.name} on {server.address}", flush=True)
        log_event(logger, logging.INFO, "serving", "", {"model": backend.info.name, "address": server.address})

    supervising = asyncio.ensure_future(Supervisor(server, start).run(on_serving))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((supervising, stopping), return_when=asyncio.FIRST_COMPLETED)
        if supervising.done():
            supervising.result()
    finally:
        stopping.cancel()
        supervising.cancel()
        await asyncio.wait((supervising,))


@contextlib.contextmanager
def _signals(server: SteerServer) -> Iterator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets; see `serve` for the following ones."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    killing = threading.Timer(SECOND_SIGNAL_S, _end_now)  # in a thread: the event loop may be what does not end
    killing.daemon = True

    def on_signal() -> None:
        if not stop.is_set():
            stop.set()
        elif not killing.is_alive():
            killing.start()
            server.stop_now()
        else:
            _end_now()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        killing.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _end_now() -> None:
    """Ends this process and its children without waiting for anything."""
    kill_descendants()
    leave_all()
    os._exit(FAILED)


def _config_from(namespace: argparse.Namespace) -> ServerConfig:
    """The settings of the flags and the environment; raises InvalidRequest for those that are not valid."""
    config = ServerConfig.from_environment()
    config = replace(
        config,
        address=_address_from(namespace, config.address),
        instance=namespace.instance,
        token_file=namespace.token_file,
        tls_cert=namespace.tls_cert,
        tls_key=namespace.tls_key,
        tls_client_ca=namespace.tls_client_ca,
        trusted_proxy=namespace.trusted_proxy,
        uds_mode=namespace.uds_mode,
        uds_group=namespace.uds_group,
        listen_when_ready=namespace.listen_when_ready,
        insecure=namespace.insecure,
        grace_s=namespace.grace,
        max_message_bytes=namespace.max_message_bytes,
        max_concurrent_requests=namespace.max_concurrent_requests,
        prefix_isolation=namespace.prefix_isolation,
        max_restarts=namespace.max_restarts,
        restart_window_s=namespace.restart_window,
        step_timeout_s=namespace.step_timeout,
        health_address=namespace.health_address,
        metrics_port=namespace.metrics_port,
        metrics_host=namespace.metrics_host,
        shared_memory=namespace.shared_memory,
        otlp_traces_endpoint=traces_endpoint(namespace.otlp_traces_endpoint or ""),
        log_level=namespace.server_log_level or config.log_level,
        log_format=namespace.log_format,
        **{name: getattr(namespace, "steer_" + name) for name in SHARED_WITH_ENGINE},
    )
    for field, address in (("address", config.address), ("health_address", config.health_address)):
        if address and not address.startswith(UNIX):
            host_and_port(address, field)
    _ = config.segments
    return config


def _address_from(namespace: argparse.Namespace, default: str) -> str:
    if namespace.uds:
        return UNIX + namespace.uds
    if namespace.host is not None and namespace.host.startswith(UNIX):
        return str(namespace.host)
    if namespace.host is None and namespace.port is None:
        return default
    host, port = ("127.0.0.1", 50051) if default.startswith(UNIX) else host_and_port(default)
    return address_of(
        host if namespace.host is None else namespace.host, port if namespace.port is None else namespace.port
    )


class EngineStart:
    """Starts the engine of a command line, each time in the same way."""

    def __init__(self, namespace: argparse.Namespace, config: ServerConfig, tokens: TokenFile | None = None) -> None:
        self._namespace = namespace
        self._config = config
        self._limits = ClientLimits(config, tokens)
        self._segments: SegmentPool | None = None

    async def __call__(self) -> Backend:
        """Loads the model; captures of an earlier engine stay, and count."""
        from steer_service.engine.config import default_of, engine_arguments_from, segment_pool
        from steer_service.engine.engine import VLLMEngine
        from steer_service.engine.start import keep_settings

        namespace = self._namespace
        namespace.model = namespace.checkpoint or namespace.model
        namespace.otlp_traces_endpoint = self._config.otlp_traces_endpoint or None
        if namespace.model is None:
            await _choose_bundled_model(namespace)
        for name in MODEL_DEPENDENT_DEFAULTS:
            if getattr(namespace, name) is None:
                setattr(namespace, name, default_of(name))
        if self._segments is None:
            self._segments = segment_pool(self._config.segments, self._limits.capture_bytes)
        else:
            gc.collect()  # vLLM leaves the threads and sockets of the dead engine to the collector
        arguments = engine_arguments_from(namespace)
        engine = await VLLMEngine.start(namespace.model, segments=self._segments, **arguments)
        keep_settings()
        engine.watch(self._config.step_timeout_s)
        return engine


async def _choose_bundled_model(namespace: argparse.Namespace) -> None:
    """The bundled model under its own name; unless a flag is given, it loads fast and takes little memory."""
    from steer_service.hf.bundled_model import NAME, SERVED_CACHE_BYTES, ensure_bundled_model

    namespace.model = str(await asyncio.to_thread(ensure_bundled_model))
    namespace.served_model_name = namespace.served_model_name or [NAME]
    if namespace.enforce_eager is None:
        namespace.enforce_eager = True  # compilation takes longer than most first trials
    if namespace.kv_cache_memory_bytes is None and namespace.gpu_memory_utilization is None:
        namespace.kv_cache_memory_bytes = SERVED_CACHE_BYTES
