"""How many calls ended with which error, in all servers of this process."""

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from steer_service.core.errors import SteerError
from steer_service.wire.status_codes import RpcStatus, status_from_error

TO_ALERT_ON = {
    "RESOURCE_EXHAUSTED": ("QUEUE_FULL", "CLIENT_QUOTA", "SHM_SPACE"),
    "UNAVAILABLE": ("LOADING", "DRAINING", "ENGINE_DIED", "ENGINE_RESTARTING"),
    "INTERNAL": ("INTERNAL",),
    "UNAUTHENTICATED": ("UNAUTHENTICATED",),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED",),
}
"""Code -> reasons that are shown from the start, with 0: the first error would not be seen as an increase else."""

_counts: Counter[tuple[str, str]] = Counter({(code, reason): 0 for code in TO_ALERT_ON for reason in TO_ALERT_ON[code]})
"""(code, reason) -> calls; both are from fixed lists."""


def counted_status(error: SteerError) -> RpcStatus:
    """The status with which a call ends now."""
    status = status_from_error(error)
    _counts[status.code.name, error.reason] += 1
    return status


class ErrorCounts(Collector):
    """The counts, for Prometheus."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        """The one series."""
        family = CounterMetricFamily(
            "steerllm_errors", "Calls that ended with an error, refusals included.", labels=["code", "reason"]
        )
        for (code, reason), count in list(_counts.items()):
            family.add_metric([code, reason], count)
        yield family
