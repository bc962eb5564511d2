"""What the API server process tells the workers about one output."""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.prompt import TextPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.engine.config import EXTRA_ARGS_KEY
from steer_service.engine.messages import WorkerRequest, worker_request
from steer_service.engine.region import RegionLayout

PROMPT, ROWS, SCOPES = 2000, 2100, 32
ALTERNATING = PromptPlaces(token_ids=(0, 1) * (PROMPT // 2), special_token_ids=(1,))


def cut_rows(scopes: int) -> RowSelection:
    """Each scope has 1000 tokens of a prompt of which every other token is special."""
    operations = [
        AddSpec(
            np.ones(2),
            positions=PositionScope(
                prompt=True, skip_special_tokens=True, generated_ranges=(PositionRange(number, number),)
            ),
        )
        for number in range(scopes)
    ]
    request = GenerateRequest(
        prompt=TextPrompt(text="a"),
        steering=SteeringSpec({0: LayerSteeringSpec(operations)}),
        capture=CaptureSpec(layers=(0, 3), positions=["prompt", "skip_special_tokens"]),
    )
    return RowSelection.of(request, PROMPT, ROWS, ALTERNATING)


def request_of(rows: RowSelection, output: str = "a/0") -> WorkerRequest:
    layout = RegionLayout(
        stages=2,
        rows=ROWS,
        sites=(CaptureSite.BEFORE, CaptureSite.AFTER),
        layers=(0, 3),
        captured=rows.captured_table,
        hidden_size=2,
        dtype="float32",
        reported=(0,),
    )
    region: Any = SimpleNamespace(layout=layout, name="segment", offset=64)
    prepared: Any = SimpleNamespace(rows=rows)
    lease: Any = SimpleNamespace(slot=3, digest="ab")
    return worker_request(prepared, output, region, lease)


def test_a_request_arrives_at_the_workers_as_it_was_sent() -> None:
    for scopes in (1, 2):
        sent = request_of(cut_rows(scopes))

        arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(sent.to_extra_args()))
        assert WorkerRequest.from_extra_args(arrived) == sent


def test_outputs_of_one_request_share_the_tables_of_its_positions() -> None:
    rows = cut_rows(2)
    one, other = request_of(rows, "a/0"), request_of(rows, "a/1")

    assert one.steered is other.steered
    assert one.scopes is other.scopes is not None
    assert one.captured is other.captured


def test_positions_with_very_many_parts_travel_as_few_bytes() -> None:
    values = request_of(cut_rows(SCOPES)).to_extra_args()[EXTRA_ARGS_KEY]

    for name in ("steered", "captured", "scopes"):
        assert isinstance(values[name], bytes), "a list of numbers is parsed one by one, between two steps"
    assert len(values["scopes"]) < 12 * ROWS, "all scopes are cut at the same rows"
