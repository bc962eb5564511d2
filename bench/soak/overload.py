"""Ten times what the server can do, from one client, beside a quiet one; each client is a process of its own.

`python -m bench.soak.overload ADDRESS AT_ONCE SECONDS TOKENS` is the loud one. It prints the tokens per
second that it received and that it asked for.
"""

import asyncio
import random
import sys
import time

from bench.soak.calls import Figures, channel_to, idle, outcome, percentile, request
from bench.soak.processes import Server, fake_server

PAUSE_S = 0.1
"""Seconds between two requests of the quiet client."""

REFUSED_S = 0.5
"""Seconds, on average, after which the loud client tries again; a refusal names a longer delay."""


async def overload(seconds: float = 30.0, capacity: int = 32, token_s: float = 0.08) -> Figures:
    """Ten times what the server can do, from one client, beside a quiet one."""
    tokens = 10
    async with fake_server(at_once=capacity, token_s=token_s, max_concurrent_requests=200) as server:
        (alone, _), solo = await _loud(server, capacity * 2, seconds / 3, tokens), await _quiet(server, seconds / 3)
        loaded = asyncio.ensure_future(_loud(server, capacity * 12, seconds, tokens))
        while not (await server.numbers())["waiting"]:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)  # until it no longer opens all at once
        beside = await _quiet(server, seconds - 4)
        rate, offered = await loaded
        await idle(server, 5.0)
    goodput, solo_p95, beside_p95 = rate / alone, percentile(solo, 0.95), percentile(beside, 0.95)
    return {
        "offered": f"{offered / alone:.1f} times the capacity",
        "goodput": f"{goodput:.0%} of {alone:.0f} tokens/s",
        "quiet client, p95 of the first token": f"{beside_p95 * 1e3:.0f} ms ({solo_p95 * 1e3:.0f} ms alone)",
        "quiet client, median": f"{percentile(beside, 0.5) * 1e3:.0f} ms ({percentile(solo, 0.5) * 1e3:.0f} ms alone)",
        "refusals of the quiet client": 0,
        "met": offered >= 9 * alone and goodput >= 0.95 and beside_p95 <= 2 * solo_p95,
    }


async def _loud(server: Server, at_once: int, seconds: float, tokens: int) -> tuple[float, float]:
    """Tokens per second, completed and asked for, of a client in a process of its own, `at_once` requests at a time."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.soak.overload", server.address, str(at_once), str(seconds), str(tokens)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    completed, asked = out.split()
    return float(completed), float(asked)


async def _quiet(server: Server, seconds: float) -> list[float]:
    """Seconds to the first token of a client that sends a request now and then."""
    times, deadline = [], time.monotonic() + seconds
    async with channel_to(server.address) as channel:
        while time.monotonic() < deadline:
            ended = await outcome(channel, request(max_tokens=2), "quiet")
            assert ended.code == "OK", ended
            times.append(ended.first_s)
            await asyncio.sleep(PAUSE_S)
    return times


async def _offer(address: str, at_once: int, seconds: float, tokens: int) -> None:
    chance = random.Random(1)
    done, asked, deadline = 0, 0, time.monotonic() + seconds
    async with channel_to(address) as channel:

        async def one() -> None:
            nonlocal done, asked
            while time.monotonic() < deadline:
                asked += tokens
                ended = await outcome(channel, request(max_tokens=tokens), "loud")
                if ended.code == "OK":
                    done += ended.tokens
                else:
                    assert ended.code == "RESOURCE_EXHAUSTED", ended
                    await asyncio.sleep(REFUSED_S * (0.5 + chance.random()))

        start = time.monotonic()
        await asyncio.gather(*(one() for _ in range(at_once)))
        seconds = time.monotonic() - start
        print(done / seconds, asked / seconds)


if __name__ == "__main__":
    asyncio.run(_offer(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
