"""The histogram of times between tokens, which is cheap enough for each token."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)


class TokenLatency(Collector):
    """Observed in one event loop, read in any thread.

    An observation of prometheus_client's histogram, which many threads may observe, takes two locks and six times as
    long: 0.8 µs, a percent or two of what the server spends on a token.
    """

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one time between two responses with tokens."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> Iterable[Metric]:
        """The one series."""
        sum_s, totals = self._sum_s, accumulate(list(self._counts))
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        yield HistogramMetricFamily(
            "steerllm_inter_token_latency_seconds",
            "From one response with tokens to the next of the same output, as they are given to gRPC. It includes the "
            "wait for a client that reads slowly, which vllm:inter_token_latency_seconds does not; with a stream "
            "interval, one response has several tokens.",
            buckets=list(zip(bounds, totals, strict=True)),
            sum_value=sum_s,
        )

    def describe(self) -> Iterable[Metric]:
        """As `collect`: the name is known."""
        return self.collect()
