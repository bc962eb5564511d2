"""What the text of an output must be like: JSON of a schema, a regular expression, a grammar or one of some choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_length, check_text
from steer_service.core.json_fields import JsonObject, as_json, json_object
from steer_service.core.number_limits import (
    MAX_CHOICES,
    MAX_CONSTRAINT_BYTES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_NESTING,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The constraint of an output's text. Exactly one field is given; the names are vLLM's.

    An output that ends early, by `max_tokens` or a stop string, has only the beginning of such a text.
    """

    json: str | None = None
    """A JSON schema, as text or as a mapping, of at most 65536 bytes and 64 levels."""
    regex: str | None = None
    """A regular expression for the whole text, 1..4096 bytes."""
    grammar: str | None = None
    """A context-free grammar in EBNF as `root ::= "yes" | "no"`, 1..65536 bytes."""
    choice: tuple[str, ...] | None = None
    """The possible texts, 1..1024 of them; together at most 65536 bytes."""

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"expected one of json, regex, grammar and choice, got {' and '.join(given) or 'none'}",
                reason="BAD_CONSTRAINT",
            )
        if self.json is not None:
            schema = json_object(self.json, "json", MAX_CONSTRAINT_BYTES)
            _check_nesting(schema)
            object.__setattr__(self, "json", as_json(schema))
        if self.choice is not None:
            self._check_choice(self.choice)
        for name, most in (("regex", MAX_REGEX_BYTES), ("grammar", MAX_CONSTRAINT_BYTES)):
            if getattr(self, name) is not None:
                _check_size(getattr(self, name), name, most)

    @classmethod
    def of(cls, value: "Self | Mapping[str, object]") -> Self:
        """`value`, or the constraint that a mapping such as `{"choice": ["yes", "no"]}` describes."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"expected a mapping, got {type(value).__name__}", reason="BAD_CONSTRAINT")
        names = [field.name for field in fields(cls)]
        for name in value:
            if name not in names:
                raise InvalidRequest(f"{name!r} is not one of {', '.join(names)}", reason="BAD_CONSTRAINT")
        return cls(**value)  # type: ignore[arg-type]  # __post_init__ checks them

    def _check_choice(self, choice: object) -> None:
        if isinstance(choice, (str, bytes)) or not isinstance(choice, Sequence):
            raise InvalidRequest(f"expected strings, got {type(choice).__name__}", reason="BAD_TEXT", field="choice")
        check_length(choice, MAX_CHOICES, "choices", "choice")
        if not choice:
            raise InvalidRequest(f"0 choices, expected 1..{MAX_CHOICES}", reason="OUT_OF_RANGE", field="choice")
        for index, text in enumerate(choice):
            _check_size(text, f"choice[{index}]", MAX_CONSTRAINT_BYTES)
        size = sum(len(text.encode()) for text in choice)
        if size > MAX_CONSTRAINT_BYTES:
            raise InvalidRequest(
                f"{size} bytes of choices, at most {MAX_CONSTRAINT_BYTES}", reason="OUT_OF_RANGE", field="choice"
            )
        object.__setattr__(self, "choice", tuple(choice))


def _check_size(text: object, name: str, most: int) -> None:
    check_text(text, name)
    assert isinstance(text, str)
    if not 1 <= len(text.encode()) <= most:
        raise InvalidRequest(
            f"the text has {len(text.encode())} bytes, expected 1..{most}", reason="OUT_OF_RANGE", field=name
        )
    if "\0" in text:
        raise InvalidRequest("the text has a NUL character", reason="BAD_TEXT", field=name)


def _check_nesting(schema: JsonObject) -> None:
    """Raises InvalidRequest for objects and lists in each other, deeper than vLLM takes."""
    level: list[object] = [schema]
    for _ in range(MAX_SCHEMA_NESTING):
        nested = [value.values() if isinstance(value, dict) else value for value in level if isinstance(value, _NESTED)]
        if not nested:
            return
        level = [value for values in nested for value in values]
    if any(isinstance(value, _NESTED) for value in level):
        raise InvalidRequest(
            f"the schema has more than {MAX_SCHEMA_NESTING} levels of objects and lists",
            reason="OUT_OF_RANGE",
            field="json",
        )


_NESTED = (dict, list)
