"""One event is one line, in text and as JSON, whatever its values hold."""

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from steer_service.core.log_lines import FORMATTERS, JsonLines, log_event, places_of

HOSTILE = 'a\r\nERROR forged: b\x1b[31m\x00"\x7f\x85\u2028 c'
LOGGER = logging.getLogger("steer_service.tests.log_lines")

Lines = Callable[[], str]


@pytest.fixture(params=FORMATTERS)
def lines(request: pytest.FixtureRequest) -> Iterator[Lines]:
    """What was logged so far, in each form."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMATTERS[request.param]())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    yield stream.getvalue
    LOGGER.removeHandler(handler)
    LOGGER.propagate = True


def test_no_value_begins_a_line_or_moves_the_cursor(lines: Lines) -> None:
    log_event(LOGGER, logging.INFO, "call", f"it says {HOSTILE}", {"client": HOSTILE, "method": HOSTILE})
    line = lines()
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert not [character for character in line[:-1] if not character.isprintable() and character != "\x7f"]


def test_json_has_stable_keys_and_the_time_in_utc() -> None:
    record = logging.LogRecord("steer_service.x", logging.WARNING, "f", 1, "a %s", ("b",), None)
    record.created = 1_700_000_000.25
    record.event, record.fields = "call", {"duration_s": 0.5, "client": HOSTILE}
    read = json.loads(JsonLines().format(record))
    assert read["time"] == "2023-11-14T22:13:20.250000+00:00"
    assert (read["level"], read["logger"], read["event"], read["message"]) == (
        "warning",
        "steer_service.x",
        "call",
        "a b",
    )
    assert (read["duration_s"], read["client"]) == (0.5, HOSTILE)


def test_text_quotes_what_is_not_plain() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "call", (), None)
    record.fields = {"method": "a.b/C", "client": 'x" code=OK', "duration_s": 0.123456789, "empty": ""}
    text = FORMATTERS["text"]().format(record)
    assert text == 'steer: INFO x: call method=a.b/C client="x\\" code=OK" duration_s=0.123457 empty=""'


def test_a_field_without_a_value_is_left_out(lines: Lines) -> None:
    log_event(LOGGER, logging.INFO, "call", "", {"reason": None, "code": "OK"})
    assert "reason" not in lines()


def test_a_level_that_is_not_logged_costs_no_line(lines: Lines) -> None:
    log_event(LOGGER, logging.DEBUG, "call")
    assert lines() == ""


def failed() -> Exception:
    try:
        try:
            raise KeyError("the prompt of a client")
        except KeyError as error:
            raise ValueError("its vectors") from error
    except ValueError as error:
        return error


def test_an_exception_is_named_with_its_places_and_without_its_message(lines: Lines) -> None:
    LOGGER.error("it broke", exc_info=failed())
    line = lines()
    assert len(line.splitlines()) == 1
    assert "ValueError at test_log_lines.py:" in line
    assert "from KeyError at" in line
    assert "the prompt" not in line
    assert "its vectors" not in line


def test_an_exception_without_a_traceback_has_no_place() -> None:
    assert places_of(ValueError("x")) == "ValueError at -"
