"""The soak of the Python client: a short run finds nothing, and what it looks for is noticed."""

import numpy as np
import pytest

from bench.soak.client_results import (
    INFO,
    Wrong,
    check_rows,
    check_text,
    is_explained,
    tokens_after,
)
from bench.soak.python_client import IDLE, SLACK, Run, grown, slope
from steer_client import EngineFailed, InvalidRequest
from steer_service.core.prompt import TokenPrompt
from steer_service.testing.fake_backend import encode_row, text_of

PROMPT = TokenPrompt(token_ids=(5, 6))


async def test_clients_are_right_before_and_after_their_server_was_killed_and_leave_nothing():
    run = Run(seed=1, stable=1, doomed=0)
    async with run.started():
        [first] = await run.tell("once")
        await run.restarted.end(is_killed=True)
        await run.restarted.start()
        [second] = await run.tell("once")
        [closed] = await run.tell("close")
        await run.left((*IDLE, "sessions"))
        run.found += await run.stable[0].end()
        await run.restarted.end(is_killed=False)
    assert run.found == []
    assert grown(first, second, SLACK, "all calls") == []
    assert (closed["segments"], closed["children"], closed["errors"]) == (0, 0, {})
    assert second["calls"] == {name: 2 * count for name, count in first["calls"].items()}


async def test_a_process_that_dies_is_noticed():
    run = Run(seed=1, stable=1, doomed=0)
    async with run.started():
        run.stable[0].process.kill()
        with pytest.raises(AssertionError, match="hangs or has ended"):
            await run.tell("rest")


def test_rows_of_another_position_and_a_text_that_is_cut_are_wrong():
    token_ids = [*PROMPT.token_ids, *tokens_after(PROMPT, 2)][:-1]
    rows = np.stack([encode_row(1, position, token, INFO) for position, token in enumerate(token_ids)])
    check_rows({1: [{"hidden": rows}]}, (1,), PROMPT, 2)
    with pytest.raises(Wrong, match="rows of layer 1"):
        check_rows({1: [{"hidden": rows[::-1]}]}, (1,), PROMPT, 2)
    text = "".join(map(text_of, tokens_after(PROMPT, 2)))
    check_text(text, PROMPT, 2)
    check_text(text[:3], PROMPT, 2, is_whole=False)
    with pytest.raises(Wrong, match="text"):
        check_text(text[:3], PROMPT, 2)


def test_only_errors_of_a_lost_server_are_explained():
    assert is_explained(EngineFailed("gone", reason="CONNECTION_LOST"))
    assert not is_explained(EngineFailed("gone", reason="INTERNAL"))
    assert not is_explained(InvalidRequest("bad"))
    assert not is_explained(TimeoutError())


def test_growth_beyond_the_slack_is_named():
    assert grown({"threads": 3}, {"threads": 4}, {"threads": 1}, "all calls") == []
    assert grown({"threads": 3}, {"threads": 5}, {"threads": 1}, "all calls") == [
        "threads of a client's process: 3 before, 5 after all calls"
    ]


def test_each_call_and_each_event_loop_may_cost_a_little():
    before = {"rss": 0, "objects": 0}
    assert grown(before, {"rss": 4096, "objects": 4000}, slope(10, 0), "10 calls") == []
    assert grown(before, {"rss": 4096, "objects": 4022}, slope(10, 1), "10 calls") == [
        "objects of a client's process: 0 before, 4022 after 10 calls"
    ]
