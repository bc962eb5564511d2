"""One deliberate fault."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A slip that somebody could make in a guard."""

    name: str
    """What is wrong then, in plain words."""
    file: str
    """The file, from the root of the tree."""
    old: str
    """The text that is replaced; it is in the file exactly once."""
    new: str
    """What stands there instead."""
    why: str
    """What would happen to users."""
    killed_by: tuple[str, ...]
    """Node ids, without parameters, of tests of which every one fails."""

    def applied_to(self, text: str) -> str:
        """The file's text with the mutant in it; raises ValueError unless `old` is there exactly once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: the text to replace is {count} times in {self.file}")
        return text.replace(self.old, self.new)


def tests_in(file: str, *names: str) -> tuple[str, ...]:
    """Node ids of tests in a file of `tests/`."""
    return tuple(f"tests/{file}::{name}" for name in names)
