"""Spans of a real engine under those of the server, and the log of all its processes as JSON."""

import asyncio
import json
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient
from tests.real_server.serving import Server
from tests.server.otlp_collector import Collector, Spans

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GENERATE = "steer.v1.GenerationService/Generate"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
MARKS = "zebra-in-the-prompt", "marked-client-id"
METADATA = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "edge-1"))


async def test_spans_of_the_engine_are_children_of_ours_and_the_log_line_names_the_trace(
    server: Server, collector: Collector, error_log: Path
) -> None:
    options = {"client_id": MARKS[1], "metadata": METADATA, "timeout_s": 300}
    async with AsyncSteerClient(server.address, **options) as client:
        await client.generate(f"The {MARKS[0]} is", n=2, max_tokens=3, ignore_eos=True)

    def of_this_trace(name: str) -> Spans:
        return [span for span in collector.spans if (span.name, span.trace_id) == (name, TRACE)]

    await asyncio.to_thread(collector.wait_until, lambda: len(of_this_trace("llm_request")) >= 2)
    await asyncio.to_thread(collector.wait_until, lambda: of_this_trace(GENERATE))
    [ours] = of_this_trace(GENERATE)
    assert ours.parent_id == PARENT
    assert ours.attributes["gen_ai.usage.output_tokens"] == 6
    assert [span.parent_id for span in of_this_trace("llm_request")] == [ours.span_id] * 2

    [line] = [line for line in objects(error_log) if line.get("trace_id") == TRACE]
    assert (line["event"], line["x_request_id"], line["generated_tokens"]) == ("call", "edge-1", 6)
    everything = str(objects(error_log)).encode() + b"".join(span.raw for span in collector.spans)
    assert not [mark for mark in MARKS if mark.encode() in everything]


def objects(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def test_the_log_of_every_process_is_json(server: Server, error_log: Path) -> None:
    lines = [line for line in server.lines_while_loading if line.strip() and not line.startswith("steer: ")]
    found = [json.loads(line) for line in lines]
    assert {"vllm"} == {line["logger"].partition(".")[0] for line in found}
    assert len({line["pid"] for line in found}) >= 2  # the server and the engine core
    assert {"time", "level", "logger", "event", "message", "process", "pid"} <= set.intersection(*map(set, found))
    events = [line["event"] for line in objects(error_log) if str(line["logger"]).startswith("steer_service")]
    assert [event for event in events if event in ("listening", "serving")] == ["listening", "serving"]
