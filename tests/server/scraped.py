"""Reads the HTTP port of a server, as Prometheus and probes do."""

import asyncio
import re
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.served import BOUND_S

CONFIGURATION = Path(__file__).parents[2] / "docs" / "configuration.md"

Series = dict[tuple[str, tuple[str, ...]], float]
"""(name, values of its labels) -> value."""


async def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    def read() -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=BOUND_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(read)


async def series(port: int) -> Series:
    _, text = await get(port, "/metrics")
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}


def documented() -> set[str]:
    """The server's own series that the documentation has."""
    return set(re.findall(r"`(steerllm_\w+)`", CONFIGURATION.read_text(encoding="utf-8")))
