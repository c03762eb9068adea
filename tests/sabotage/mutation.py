"""`Mutation`: one line of the code, broken, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One line, broken."""

    name: str
    why: str
    """What would go wrong, for whoever trains on it."""
    file: str
    """Under ``src/turnwise``."""
    old: str
    """Text that stands in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """Pytest ids; at least one must fail."""

    def apply(self, source: str) -> str:
        """The file's text with the line broken.

        Raises:
            ValueError: ``old`` is not in it exactly once: the mutation has to follow the code.
        """
        if (found := source.count(self.old)) != 1:
            raise ValueError(
                f"mutation {self.name}: {self.old!r} is {found} times in {self.file}; it must be there once"
            )
        return source.replace(self.old, self.new)
