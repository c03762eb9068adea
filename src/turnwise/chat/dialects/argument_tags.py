"""Arguments between tags, where a value is bare text and may hold those very tags.

Nothing is escaped in these forms: a file that the policy writes may well contain ``</parameter>``. So a value
ends at the first closing tag after which the call goes on as a call does, with another argument or its end.
Two readings are tried for one that closes the whole call: in the first an opening tag within a value has its
closing tag there too (a value that holds a whole call), in the second it is mere text. Where neither closes,
the call is malformed, and is gone through step by step for what is wrong.

Text that is truly ambiguous (a value that ends its own argument and begins another) is read as what it looks
like, always the same; a renderer refuses to demonstrate it. An argument that the tool does not have is read
as one where it stands in due form: models invent arguments more often than they write about tags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from turnwise.chat.dialects.json_text import reason, skip_space, value_fault
from turnwise.chat.dialects.tagged import CallFault, Made, found

DEEPEST_VALUE = 8
"""Arguments open at once within a value: a policy that loops opens thousands."""

Entry = tuple[re.Match[str], str]
"""The opening tag of an argument, and all that stands up to its closing tag."""


class ArgumentTags:
    """How a family writes the arguments of one call.

    Args:
        opening: Pattern of what stands before a value; its group ``key`` is the name.
        form: ``opening`` in words.
        closing: What stands after a value.
        ends: What stands after the last argument; the last of it closes the call.
        call: Pattern of a call's beginning, so much of it that it can hardly be part of a value.
        begins: Pattern of a call's beginning after a call that ended; ``call`` where it is empty.
        due: Pattern of an opening in due form, which can hardly be part of a value; ``opening`` where it is
            empty.
    """

    def __init__(
        self,
        *,
        opening: str,
        form: str,
        closing: str,
        ends: Sequence[str],
        call: str,
        begins: str = "",
        due: str = "",
    ) -> None:
        end = r"\s*".join(map(re.escape, ends))
        self.form, self.closing, self.ends = form, closing, ends
        self._opening = re.compile(opening)
        self._due = re.compile(due or opening, re.MULTILINE)
        self._tag = re.compile(f"{opening}|{re.escape(closing)}")
        self._closing = re.compile(re.escape(closing))
        self._call = re.compile(call)
        self._call_tag = re.compile(f"{call}|{re.escape(ends[-1])}")
        self._end = re.compile(rf"\s*{end}")
        self._call_or_end = re.compile(rf"{begins or call}|(?P<end>{re.escape(closing)}\s*{end})")

    def read(self, text: str, start: int, known: Collection[str] = ()) -> tuple[list[Entry], int]:
        """The arguments of a call, and the place of the tag that closes it.

        Args:
            text: Where they stand.
            start: Where they begin.
            known: Arguments that the tool has: one that begins within a value means that a closing tag is
                missing.

        Raises:
            CallFault: The call does not close, or something else stands between its arguments.
        """
        nested = self._whole(text, start, known, nested=True)
        if nested is not None and self._is_clean(nested[0], known):
            return nested
        flat = self._whole(text, start, known, nested=False)
        if flat is not None and self._is_clean(flat[0], known):
            return flat
        return nested or self._stepwise(text, start, known)

    def _whole(
        self, text: str, start: int, known: Collection[str], *, nested: bool
    ) -> tuple[list[Entry], int] | None:
        """What `read` returns, in one of the two readings; None where the call does not close."""
        entries: list[Entry] = []
        position = skip_space(text, start)
        while opening := self._opening.match(text, position):
            close = self._close(text, opening.end(), known, nested=nested)
            value = text[opening.end() : close]
            if close < 0 or self._swallows_call(value):
                return None
            entries.append((opening, value))
            position = skip_space(text, close + len(self.closing))
        end = self._end.match(text, position)
        return None if end is None else (entries, end.end() - len(self.ends[-1]))

    def _is_clean(self, entries: Sequence[Entry], known: Collection[str]) -> bool:
        """Whether no argument comes twice, and none that the tool has was swallowed by another's value."""
        names = {opening["key"] for opening, _ in entries}
        return len(names) == len(entries) and not any(
            self._swallowed(text, names, known) for _, text in entries
        )

    def _swallows_call(self, value: str) -> bool:
        """Whether a call begins within a value and does not end there: the end of this one is missing."""
        depth = 0
        for tag in self._call_tag.finditer(value):
            depth = max(0, depth - 1) if tag.group() == self.ends[-1] else depth + 1
        return depth > 0

    def _swallowed(self, value: str, given: Collection[str], known: Collection[str]) -> bool:
        """Whether an argument of the tool's, not given otherwise, begins within a value."""
        return any(
            sibling["key"] in known and sibling["key"] not in given for sibling in self._due.finditer(value)
        )

    def _close(self, text: str, start: int, known: Collection[str], *, nested: bool) -> int:
        """Where the value that begins at ``start`` ends; -1 where it does not."""
        depth = 0
        for tag in (self._tag if nested else self._closing).finditer(text, start):
            if tag.group() != self.closing:
                depth += 1
                if depth > DEEPEST_VALUE:
                    return -1
            elif depth:
                depth -= 1
            elif self._goes_on(text, tag.end(), known):
                return tag.start()
        return -1

    def _goes_on(self, text: str, position: int, known: Collection[str]) -> bool:
        """Whether the call goes on, or ends for good, after a closing tag."""
        position = skip_space(text, position)
        opening = self._opening.match(text, position)
        if opening is not None:
            return opening["key"] in known or not known or self._due.match(text, position) is not None
        end = self._end.match(text, position)
        if end is None:
            return False
        # A second end with no call before it: the first was part of a value.
        other = self._call_or_end.search(text, end.end())
        return other is None or other["end"] is None

    def _stepwise(self, text: str, start: int, known: Collection[str]) -> tuple[list[Entry], int]:
        """The arguments of a call that does not close, if no more than its last tag is missing."""
        entries: list[Entry] = []
        position = skip_space(text, start)
        while opening := self._opening.match(text, position):
            close = text.find(self.closing, opening.end())
            value = text[opening.end() : close]
            entries.append((opening, value))
            given = {opening["key"] for opening, _ in entries}
            if close < 0 or self._swallows_call(value) or self._swallowed(value, given, known):
                raise CallFault(
                    f"the argument {opening['key']!r} is not closed: {self.closing} is missing",
                    opening.end(),
                )
            position = skip_space(text, close + len(self.closing))
        for index, end in enumerate(self.ends):
            last = index == len(self.ends) - 1
            cut = position == len(text) or self._call.match(text, position) is not None
            if last and (index or cut or text.startswith(end, position)):
                break
            if not text.startswith(end, position):
                wanted = end if index else f"{self.form} or {end}"
                raise CallFault(f"expected {wanted}, found {found(text, position)}", position)
            position = skip_space(text, position + len(end))
        return entries, position


def made_call(name: str, entries: Sequence[Entry], read: Callable[[Entry], Any], end: int) -> Made:
    """A call out of its arguments.

    Args:
        name: Of the tool.
        entries: Its arguments, as they stand in the text.
        read: The value of an argument.
        end: Where the call's text ends.

    Raises:
        CallFault: An argument is given twice, cannot be read, or cannot be stored.
    """
    arguments: dict[str, Any] = {}
    for entry in entries:
        key = entry[0]["key"]
        if key in arguments:
            raise CallFault(f"the argument {key!r} is given twice", end)
        try:
            arguments[key] = read(entry)
        except (ValueError, RecursionError) as cause:
            raise CallFault(f"the argument {key!r} cannot be read: {reason(cause)}", end) from cause
    error = value_fault({"name": name, "arguments": arguments})
    if error is not None:
        raise CallFault(error, end)
    return name, arguments
