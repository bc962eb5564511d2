"""JSON in which no object has a name twice: the parser alone would keep the last value without a word."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from steer_service.core.errors import InvalidRequest


def parse_json(text: str | bytes, *, field: str, parse_int: Callable[[str], Any] = int) -> Any:
    """The parsed `text`.

    Raises ValueError for text that is not JSON, and InvalidRequest, with this `field`, for a name that is twice in one
    object.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise InvalidRequest(
                f"the name {twice!r:.60} is twice in one object; remove one of both", reason="BAD_JSON", field=field
            )
        return found

    return json.loads(text, object_pairs_hook=checked, parse_int=parse_int)
