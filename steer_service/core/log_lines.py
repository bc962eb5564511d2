"""Log lines: one line per event, as text or as a JSON object, whatever its values hold.

Of an exception they have the type and the places in the source and not the message, which may quote a client.
"""

import json
import logging
import re
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

LEVELS = ("debug", "info", "warning", "error", "critical")
"""Names of levels, the most lines first."""

FORMATS = ("text", "json")

_PLAIN = re.compile(r"[\w.:/@+~-]+", re.ASCII)
"""Values that need no quotes in text."""

_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that begin a line, move the cursor or end a text."""

MOST_FRAMES = 20
"""Places in the source that are named for one exception, the innermost."""

Field = str | int | float | bool | None
"""A value of an event; None is left out."""

NO_FIELDS: Mapping[str, Field] = {}


def log_event(
    logger: logging.Logger, level: int, event: str, message: str = "", fields: Mapping[str, Field] = NO_FIELDS
) -> None:
    """Logs an event: its name for programs, a sentence for people, and its fields."""
    if logger.isEnabledFor(level):
        given = {name: value for name, value in fields.items() if value is not None}
        logger.log(level, message or event, extra={"event": event, "fields": given})


class Without(logging.Filter):
    """Drops warnings that begin in one of several ways, and no errors."""

    def __init__(self, beginnings: Sequence[str]) -> None:
        super().__init__()
        self._beginnings = tuple(beginnings)

    def filter(self, record: logging.LogRecord) -> bool:
        """False for such a warning."""
        return record.levelno > logging.WARNING or not record.getMessage().startswith(self._beginnings)


class TextLines(logging.Formatter):
    """`steer: LEVEL logger: message name=value ...`; characters that are not printable are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        parts = [f"steer: {record.levelname} {record.name}: {record.getMessage()}"]
        parts += [f"{name}={_text_of(value)}" for name, value in getattr(record, "fields", {}).items()]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(places_of(record.exc_info[1]))
        return _NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", " ".join(parts))


class JsonLines(logging.Formatter):
    """A JSON object with `time`, `level`, `logger`, `event` and `message`, and the fields of the event."""

    def __init__(self, *, shows_exceptions: bool = False) -> None:
        """`shows_exceptions`: lines have the whole of an exception, with its message; for vLLM's."""
        super().__init__()
        self._shows_exceptions = shows_exceptions

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
            "process": getattr(record, "vllm_process_name", record.processName),
            "pid": record.process,
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            shown = self.formatException(record.exc_info) if self._shows_exceptions else places_of(record.exc_info[1])
            line["exception"] = shown
        return json.dumps(line, default=str)


FORMATTERS: dict[str, type[logging.Formatter]] = {"text": TextLines, "json": JsonLines}
"""Format -> its formatter."""


def places_of(error: BaseException) -> str:
    """The type of an exception and where it passed through, outermost first, on one line; then those of its cause."""
    frames = traceback.extract_tb(error.__traceback__)[-MOST_FRAMES:]
    places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{type(error).__name__} at {places or '-'}" + (f"; from {places_of(cause)}" if cause is not None else "")


def _text_of(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
