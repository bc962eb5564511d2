"""Fields that are JSON: arguments of a chat template, tools and tool calls."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from steer_service.core.errors import InvalidRequest

JsonObject = Mapping[str, object]
"""An object of JSON: texts, numbers, booleans, None, lists and objects by name."""


def as_json(value: JsonObject) -> str:
    """A JSON object as text; the order of its keys is kept."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_object(value: Any, name: str, most_bytes: int) -> dict[str, object]:
    """A copy of `value`, a JSON object or its text; raises InvalidRequest (BAD_JSON), with `name` as its field.

    It has at most `most_bytes` bytes as text: those of `value` if that is text, or of `as_json`.
    """
    if not isinstance(value, (str, Mapping)):
        raise InvalidRequest(f"expected a JSON object, got {type(value).__name__}", reason="BAD_JSON", field=name)
    try:
        text = value if isinstance(value, str) else as_json(dict(value))
        size = len(text.encode())
        if size > most_bytes:
            raise InvalidRequest(f"{size} bytes of JSON, at most {most_bytes}", reason="OUT_OF_RANGE", field=name)
        read = json.loads(text, parse_constant=_refuse_constant)
        if isinstance(value, str):  # 1e999 and half of a surrogate pair can be read, and not be sent
            as_json({name: read}).encode()
    except InvalidRequest:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"not a JSON object: {error}", reason="BAD_JSON", field=name) from None
    if not isinstance(read, dict):
        raise InvalidRequest(f"expected a JSON object, got {type(read).__name__}", reason="BAD_JSON", field=name)
    return read


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
