r"""`Differences`: observations that repeat the whole history become what is new in each.

"Guess a word."                       -> "Guess a word."
"Guess a word.\n[crane] G--Y-"        -> "[crane] G--Y-"
"""

from __future__ import annotations

from typing import Any


class Differences:
    """What a field held when it was last looked at, in this episode."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def fresh(self, name: str, value: Any) -> Any:
        """What ``value`` adds to the last one of this name: the rest of a text or a list that goes on.

        One that does not go on, as where the history was cut to a window, is new as a whole.
        """
        last, self._last[name] = self._last.get(name), value
        if isinstance(value, str) and isinstance(last, str) and last and value.startswith(last):
            return value[len(last) :].lstrip("\n")
        if isinstance(value, list) and isinstance(last, list) and value[: len(last)] == last:
            return value[len(last) :]
        return value
