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
from collections.abc import Iterator, Sequence

from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.cli.logs import begin_log, begin_own_log, sentence_of
from steer_service.cli.parser import CommandParser, WideHelp
from steer_service.cli.server_flags import add_server_arguments, config_from, set_engine_variables, set_shared_defaults
from steer_service.cli.start_checks import (
    cache_bytes_in,
    check_machine,
    check_memory,
    check_model,
    check_settings,
    is_model_known,
)
from steer_service.core.backend import Backend
from steer_service.core.errors import InvalidRequest, SteerError
from steer_service.core.log_lines import log_event
from steer_service.core.processes import kill_descendants
from steer_service.server.app import SteerServer
from steer_service.server.client_limits import ClientLimits
from steer_service.server.config import ServerConfig
from steer_service.server.event_loop import kept_heap, new_event_loop
from steer_service.server.supervisor import StartBackend, Supervisor
from steer_service.server.tokens import TokenFile
from steer_service.shm.instances import leave_all
from steer_service.shm.pool import SegmentPool

logger = logging.getLogger(__name__)

MODEL_DEPENDENT_DEFAULTS = ("enforce_eager", "gpu_memory_utilization")
"""Flags whose default depends on whether the model is the bundled one."""

CACHE_FLAG = "--kv-cache-memory-bytes"
"""vLLM's flag of the memory for keys and values."""

EPILOG = """\
The server's flags have environment variables, such as STEERLLM_GRACE_S: docs/configuration.md. vLLM's engine flags are
accepted under their own names. Those are --max-model-len, --dtype, --gpu-memory-utilization, --tensor-parallel-size,
--served-model-name, --generation-config and many more, see `steer serve --help-all`.
"""

SECOND_SIGNAL_S = 4.0
"""Seconds after a second signal within which the server must have ended; then its processes are killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server's flags, and every engine flag of vLLM under its own name.

    Raises InvalidRequest for an environment variable that is not valid.
    """
    from steer_service.engine.config import add_engine_arguments

    ours = argparse.ArgumentParser()
    add_own_arguments(ours)
    add_engine_arguments(parser)
    _add_ours(parser, beside_vllms=True)
    # The help shows our groups first, in this order.
    titles = [group.title for group in ours._action_groups]
    parser._action_groups.sort(key=lambda group: titles.index(group.title) if group.title in titles else len(titles))
    set_shared_defaults(parser)
    # vLLM's default model is on a hub; None stands for a flag that was not given.
    parser.set_defaults(model=None, **dict.fromkeys(MODEL_DEPENDENT_DEFAULTS))


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that are not vLLM's: all that `--help` shows, without importing vLLM."""
    from steer_service.engine.steering_config import add_steering_arguments

    _add_ours(parser, beside_vllms=False)
    add_steering_arguments(parser)
    set_shared_defaults(parser)


def _add_ours(parser: argparse.ArgumentParser, *, beside_vllms: bool) -> None:
    parser.usage = "steer serve [MODEL] [flags]"
    parser.epilog = EPILOG
    parser.formatter_class = WideHelp
    parser.add_argument("checkpoint", metavar="MODEL", nargs="?", help="folder or name (default: the bundled model)")
    parser.add_argument("--help-all", action="help", help="show vLLM's engine flags too")
    add_server_arguments(parser, ServerConfig.from_environment(), beside_vllms=beside_vllms)


def refuse(words: Sequence[str]) -> int | None:
    """The exit status of a command line that is refused without vLLM, after its sentence; None for any other."""
    parser = CommandParser(prog="steer serve")
    add_own_arguments(parser)
    parser.add_argument(CACHE_FLAG)
    namespace, others = parser.parse_known_args(words)
    try:
        config = config_from(namespace)
        check_settings(config, namespace)
    except SteerError as error:
        print(f"steer: {sentence_of(error)}", file=sys.stderr)
        return BAD_USAGE
    try:
        check_machine(config, namespace)
        if is_model_known(words, others):
            model = namespace.checkpoint if not others else words[0]
            check_model(model)
            warning = check_memory(model, cache_bytes_in(namespace.kv_cache_memory_bytes))
            if warning:
                print(f"steer: warning: {warning}", file=sys.stderr)
    except SteerError as error:
        begin_own_log(config)
        return _failed(config, error)
    return None


def run(namespace: argparse.Namespace) -> int:
    """Serves until a signal comes or the engine dies too often; returns the exit status."""
    try:
        config = config_from(namespace)
        set_engine_variables(namespace)
    except SteerError as error:
        print(f"steer: {sentence_of(error)}", file=sys.stderr)
        return BAD_USAGE
    begin_log(config, namespace.server_log_level)
    try:
        tokens = TokenFile(config.token_file) if config.token_file else None
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(serve(config, EngineStart(namespace, config, tokens), tokens))
    except SteerError as error:
        return _failed(config, error)


def _failed(config: ServerConfig, error: SteerError) -> int:
    """Writes why no server runs, in the form of the log; returns the exit status."""
    if config.log_format == "text":
        print(f"steer: {sentence_of(error)}", file=sys.stderr)
    else:
        log_event(logger, logging.CRITICAL, "failed", str(error), {"reason": error.reason})
    return BAD_USAGE if isinstance(error, InvalidRequest) else FAILED


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
        from steer_service.engine.vllm_logs import hide_noise

        namespace = self._namespace
        if namespace.server_log_level is None:
            hide_noise()
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
