"""What a notebook shows of data: one line, with what matters."""

import pytest

from steer_service.core.events import Receipt
from steer_service.core.one_line import WIDTH, layers_shown


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        ((), "no layer"),
        ((5,), "layer 5"),
        ((2, 9, 5), "layers 2, 5, 9"),
        (tuple(range(30)), "layers 0-29"),
        (tuple(range(0, 31, 2)), "16 layers of 0-30"),
    ],
)
def test_layers_are_shown_in_a_few_words(layers: tuple[int, ...], shown: str) -> None:
    assert layers_shown(layers) == shown


def test_a_receipt_shows_what_was_applied_uncut() -> None:
    receipt = Receipt(
        steering_digest="0123456789abcdef" * 4,
        steered_layers=tuple(range(0, 126, 2)),
        rows_steered=1_048_576,
        captured_layers=tuple(range(126)),
        rows_captured=1_048_576,
        rows_from_prefix_cache=16,
        rows_total=1_048_576,
        bytes_captured=1 << 40,
    )
    assert repr(receipt) == (
        "Receipt(1048576 rows, 1048576 steered at 63 layers of 0-124 by 01234567, "
        "1048576 captured at layers 0-125, 16 cached)"
    )
    assert len(repr(receipt)) <= WIDTH
    assert repr(Receipt(rows_total=5)) == "Receipt(5 rows)"
