"""Requests through two replicas behind Envoy, of which one is killed and one is drained: `python -m bench.replicas`.

Half of the requests are steered, and a quarter capture rows by every delivery in turn. Each token and each row is
compared with a direct run of the same request. Clients repeat what the errors say may be repeated. The exit status is 1
if anything was wrong or lost.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import trustme

from bench.results import keep
from steer_client import (
    AsyncSteerClient,
    CaptureDelivery,
    CaptureSite,
    CaptureSpec,
    SteerError,
    SteeringSpec,
    tls_credentials,
)
from steer_service.core.capture import CapturedRows
from steer_service.core.stored_capture import in_order
from steer_service.runtime.retry import LOST, RetryPolicy
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.deploy.fleet import Certificates, Envoy, Replica, envoy, own_addresses, own_host, starting, until

CLIENTS = 20
TOKEN_S = 0.05
RETRY_S = 60.0
"""Seconds for which a client goes on trying."""
CAPTURE_GONE = frozenset({"UNKNOWN_CAPTURE"})
"""A held capture is lost with its replica, and what asked for it may be sent again."""


@dataclass(frozen=True)
class Ask:
    """A request."""

    prompt: Sequence[int]
    max_tokens: int
    steering: SteeringSpec | None
    capture: CaptureSpec | None

    async def run(self, backend: Any) -> tuple[tuple[int, ...], list[np.ndarray]]:
        """Its tokens, and its rows by layer and site."""
        [generation], handles = await backend.generate(
            [list(self.prompt)],
            max_tokens=self.max_tokens,
            steering_spec=self.steering,
            capture=self.capture,
            raw_output=True,
        )
        tokens = generation.outputs[0].token_ids
        if handles is None:
            return tuple(tokens), []
        async with handles[0]:
            rows: CapturedRows = await handles[0].fetch_rows()
            return tuple(tokens), [np.array(hidden) for _, _, hidden in in_order(rows)]


def asks(count: int) -> list[Ask]:
    """Every second one is steered, and every fourth captures rows: half of them are steered too."""
    chance, made = random.Random(0), list[Ask]()
    deliveries = (CaptureDelivery.INLINE, CaptureDelivery.HELD, CaptureDelivery.SHARED_MEMORY_PREFERRED)
    for number in range(count):
        vector = np.array([chance.gauss(0, 1) for _ in range(FAKE_MODEL.hidden_size)], np.float32)
        steering = SteeringSpec.simple_add(layer=1, vector=vector, scale=chance.uniform(0.1, 2))
        capture = CaptureSpec(layers=(0, 2), site=CaptureSite.BOTH, delivery=deliveries[number // 4 % len(deliveries)])
        made.append(
            Ask(
                prompt=[chance.randrange(FAKE_MODEL.vocab_size) for _ in range(chance.randrange(1, 30))],
                max_tokens=chance.randrange(4, 24),
                steering=steering if number % 2 else None,
                capture=capture if number % 8 in (0, 3) else None,
            )
        )
    return made


@dataclass
class Tally:
    """What became of the requests."""

    done: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    """Reasons of errors that clients may not repeat, or have repeated for too long."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Attempts that failed, by reason."""
    repeated_requests: int = 0
    """Requests that needed more than one attempt."""


async def send(ask: Ask, client: AsyncSteerClient, retry: RetryPolicy, tally: Tally) -> None:
    """Sends a request until it succeeds, and compares its result."""
    attempts = 0

    async def attempt() -> Any:
        nonlocal attempts
        attempts += 1
        try:
            return await ask.run(client)
        except SteerError as error:
            tally.repeated[error.reason] += 1
            raise

    try:
        tokens, rows = await retry.repeat(attempt)
    except SteerError as error:
        tally.lost.append(error.reason)
        return
    finally:
        tally.done += 1
        tally.repeated_requests += attempts > 1
    expected_tokens, expected_rows = await ask.run(FakeBackend())
    same_rows = len(rows) == len(expected_rows) and all(map(np.array_equal, rows, expected_rows))
    tally.wrong += not (tokens == expected_tokens and same_rows)


class Fleet:
    """Two replicas behind Envoy; each may be killed or drained, and is then started again at the same address."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        # A server that is killed leaves its segments, which go with the folder.
        self.shm_dir = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="replicas-"))
        self.running_at_faults: list[int] = []
        """Requests that ran on the replica that was killed, and on the one that was drained."""
        self.replicas = [self._start(address) for address in own_addresses(2)]
        for replica in self.replicas:
            replica.wait_serving()
        host = own_host()
        self.certificates = Certificates.write(folder, trustme.CA(), host)
        addresses = [replica.address for replica in self.replicas]
        self.envoy: Envoy = stack.enter_context(envoy(folder, addresses, self.certificates, host=host))
        self._wait_healthy()

    def _start(self, address: str) -> Replica:
        return self._stack.enter_context(starting(address, token_s=TOKEN_S, shared_bytes=1 << 26, shm_dir=self.shm_dir))

    def kill(self) -> None:
        """Kills the first replica in the middle of its requests; starts it again, and waits until Envoy knows."""
        self._wait_busy(0)
        self.replicas[0].kill()
        self._again(0)

    def drain(self) -> None:
        """Drains the second one; raises RuntimeError if it does not end with status 0."""
        self._wait_busy(1)
        self.replicas[1].begin_drain()
        if status := self.replicas[1].process.wait():
            raise RuntimeError(f"the replica ended with status {status}")
        self._again(1)

    def _wait_busy(self, index: int) -> None:
        running = 0

        def is_busy() -> bool:
            nonlocal running
            running = self.replicas[index].numbers()["backend"]
            return running > 0

        until(is_busy)
        self.running_at_faults.append(running)

    def _again(self, index: int) -> None:
        self.replicas[index] = self._start(self.replicas[index].address)
        self.replicas[index].wait_serving()
        self._wait_healthy()

    def _wait_healthy(self) -> None:
        until(lambda: len(self.envoy.healthy()) == 2)


@asynccontextmanager
async def clients(fleet: Fleet) -> AsyncIterator[list[AsyncSteerClient]]:
    """Clients with ids and connections of their own."""
    credentials = tls_credentials(ca=fleet.certificates.ca)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                AsyncSteerClient(
                    fleet.envoy.address,
                    credentials=credentials,
                    client_id=f"client-{number}",
                    shm_dir=fleet.shm_dir,
                )
            )
            for number in range(CLIENTS)
        ]


async def measure(count: int, at_once: int) -> dict[str, Any]:
    """Runs it; the faults come after a quarter and after a half of the requests."""
    tally, todo = Tally(), iter(list(enumerate(asks(count))))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        fleet = await asyncio.to_thread(Fleet, stack, Path(folder))
        start = time.monotonic()
        async with clients(fleet) as made:
            retries = [RetryPolicy(RETRY_S, lambda _: None, LOST | CAPTURE_GONE) for _ in made]

            async def work() -> None:
                for number, ask in todo:
                    await send(ask, made[number % CLIENTS], retries[number % CLIENTS], tally)

            async def fault(after: int, cause: Callable[[], None]) -> None:
                while tally.done < after:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(cause)

            async def faults() -> None:
                await fault(count // 4, fleet.kill)
                await fault(max(tally.done, count // 2), fleet.drain)

            await asyncio.gather(faults(), *[work() for _ in range(at_once)])
        return {
            "requests": tally.done,
            "running_at_kill": fleet.running_at_faults[0],
            "running_at_drain": fleet.running_at_faults[1],
            "wrong": tally.wrong,
            "lost": len(tally.lost),
            "lost_reasons": dict(Counter(tally.lost)),
            "repeated_requests": tally.repeated_requests,
            "failed_attempts": dict(tally.repeated),
            "retries_of_envoy": fleet.envoy.counter("cluster.replicas.upstream_rq_retry"),
            "seconds": round(time.monotonic() - start, 1),
        }


def main() -> int:
    """Measures and prints; the exit status is 1 if anything was wrong or lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--at-once", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the results to this file; its other keys stay")
    options = parser.parse_args()
    result = asyncio.run(measure(options.requests, options.at_once))
    keep({"replicas": result}, options.out)
    return int(bool(result["wrong"] or result["lost"] or result["requests"] != options.requests))


if __name__ == "__main__":
    sys.exit(main())
