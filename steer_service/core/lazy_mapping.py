"""A read-only mapping whose values are made when they are first read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LazyMapping(Mapping[Key, Value]):
    """Key -> `make(key)`, which is called when the key is first read and kept. Its pickle is a plain dict."""

    def __init__(self, keys: Iterable[Key], make: Callable[[Key], Value]) -> None:
        self._keys = dict.fromkeys(keys)
        self._make = make
        self._made: dict[Key, Value] = {}

    def __getitem__(self, key: Key) -> Value:
        if key not in self._keys:
            raise KeyError(key)
        if key not in self._made:
            self._made.setdefault(key, self._make(key))  # of two threads at once, both get the value of the first
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # the inherited one would make the value

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._keys)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
