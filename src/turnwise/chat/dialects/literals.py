"""Values as Gemma and the Python-like families write them: the part of their grammars that is the same.

Read by hand, not by ``ast`` or by turning the text into JSON. Faults can say what stood where, a thousand
brackets cost nothing, and parameters called ``from`` or ``class`` are as good as others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from turnwise.chat.dialects.json_text import DEEPEST, read_value, skip_space
from turnwise.chat.dialects.tagged import CallFault, found

_WORD = re.compile(r"[^\s,:=()\[\]{}'\"<>]+")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


class LiteralReader:
    """A place in a text, moved on by what is read.

    Args:
        text: What is read.
        at: From where on.
    """

    quotes: str
    """How a string is written, for faults."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def string(self) -> str | None:
        """The string that stands next; None where none begins.

        Raises:
            CallFault: It does not end.
        """
        raise NotImplementedError

    def key(self) -> str:
        """The key of an object's entry.

        Raises:
            CallFault: There is none.
        """
        raise NotImplementedError

    def value(self, level: int) -> Any:
        """The value that stands next: a string, a list, an object, a number, true, false or null.

        Args:
            level: Of the list or object that it would be; a call's arguments are level 1.

        Raises:
            CallFault: There is none.
        """
        string = self.string()
        if string is not None:
            return string
        if self.take("["):
            self._check(level)
            items: list[Any] = []
            self.each("]", lambda: items.append(self.value(level + 1)))
            return items
        if self.take("{"):
            self._check(level)
            return self.entries("}", self.key, ":", level)
        return self._scalar()

    def entries(self, closing: str, key: Callable[[], str], sign: str, level: int) -> dict[str, Any]:
        """Entries ``key sign value`` between commas, up to ``closing``, which is passed.

        Raises:
            CallFault: There are none, or a key comes twice.
        """
        entries: dict[str, Any] = {}

        def read() -> None:
            start = self.at
            name = key()
            if name in entries:
                raise CallFault(f"{name!r} is given twice", start)
            self.need(sign)
            entries[name] = self.value(level + 1)

        self.each(closing, read)
        return entries

    def each(self, closing: str, read: Callable[[], None]) -> None:
        """Whatever ``read`` reads, between commas, up to ``closing``, which is passed."""
        while not self.take(closing):
            read()
            if not self.take(","):
                if not self.take(closing):
                    raise self.fault(f"',' or {closing!r}")
                return

    def take(self, token: str) -> bool:
        """Whether ``token`` stands next, white space apart; it is passed then."""
        at = skip_space(self.text, self.at)
        if not self.text.startswith(token, at):
            return False
        self.at = at + len(token)
        return True

    def need(self, token: str) -> None:
        """Pass ``token``.

        Raises:
            CallFault: Something else stands next.
        """
        if not self.take(token):
            raise self.fault(repr(token))

    def match(self, pattern: re.Pattern[str]) -> str:
        """What of ``pattern`` stands next, white space apart; it is passed."""
        at = skip_space(self.text, self.at)
        matched = pattern.match(self.text, at)
        if matched is None:
            return ""
        self.at = matched.end()
        return matched.group()

    def fault(self, expected: str) -> CallFault:
        """That something else was expected here."""
        at = skip_space(self.text, self.at)
        return CallFault(f"expected {expected}, found {found(self.text, at)}", at)

    def _scalar(self) -> Any:
        start = self.at
        word = self.match(_WORD)
        if word in _WORDS:
            return _WORDS[word]
        if not word:
            raise self.fault("a value")
        try:
            number, end = read_value(word)
        except json.JSONDecodeError:
            number, end = None, 0
        except ValueError as cause:
            raise CallFault(str(cause), start) from cause
        if end != len(word):
            raise CallFault(f"{word[:20]!r} is no value: {self.quotes}", start)
        return number

    def _check(self, level: int) -> None:
        if level > DEEPEST:
            raise CallFault(f"it is nested too deeply: {DEEPEST} levels are allowed", self.at)
