"""vLLM's own series of Prometheus, under their own names, as this server must show them.

Autoscalers and routers of inference servers read `vllm:num_requests_waiting`. Requests that wait in this server's queue
have not reached vLLM yet: they are added.

Relies on (vLLM 0.24 to 0.33): vLLM's stat loggers register their series, whose names begin with `vllm:`, with
prometheus_client's default registry, and a restarted engine replaces them.
"""

from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector, CollectorRegistry

WAITING = "vllm:num_requests_waiting"
PREFIXES = ("vllm:", "process_", "python_info")
"""Beginnings of the names of the default registry's series that are shown: vLLM's, and those of the process."""


class EngineSeries(Collector):
    """The series; `waiting` counts the requests in the server's queue."""

    def __init__(self, waiting: Callable[[], int], registry: CollectorRegistry = REGISTRY) -> None:
        self._waiting = waiting
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """The series as they are now."""
        for series in self._registry.collect():
            if series.name.startswith(PREFIXES):
                if series.name == WAITING and series.samples:
                    first, *others = series.samples
                    series.samples = [first._replace(value=first.value + self._waiting()), *others]
                yield series

    def describe(self) -> Iterable[Metric]:
        """None: names are not known before the engine has started."""
        return ()
