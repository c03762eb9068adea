"""What environments take and answer: tasks, steps, tool results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, Self

from turnwise.types.chat import Content, Message, ToolCall

Task = Mapping[str, Any]
"""One JSON row: what an environment needs to start an episode."""


class Kept(dict[str, Any]):
    """A value of a task that is no JSON: the JSON that stands for it on disk, and in memory the value too.

    Kept({"type": "python", "class": "datetime.date", "row": 3, "column": "day"}, date(2024, 1, 1))

    Who is handed the row of a task is handed the value (`turnwise.images.revived`).
    """

    __slots__ = ("value",)

    def __init__(self, stands: Mapping[str, Any], value: Any) -> None:
        super().__init__(stands)
        self.value = value

    def __copy__(self) -> Self:
        """Itself."""
        return self

    def __deepcopy__(self, _: Any) -> Self:
        """Itself: the value may be of a kind that cannot be copied."""
        return self


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to a reply; a tool may return one too, to pay or to end.

    Step("The ball is at column 2.")                       # go on
    Step("Correct.", reward=1.0, terminated=True)          # the task is over
    Step("You ran out of fuel.", truncated=True)           # a limit of the environment's own
    """

    observation: Content | list[Message] = ""
    _: KW_ONLY
    reward: float | None = None
    """Paid for this step; None pays nothing."""
    terminated: bool = False
    """The task reached an end of its own."""
    truncated: bool = False
    """The environment cut it short; never set together with ``terminated``."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for people and metrics; the policy never sees them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What came of one tool call, failing ones included."""

    call: ToolCall
    content: Content
    """What the model is told."""
    error: Literal["malformed", "unknown_tool", "bad_arguments", "raised", "timeout", "bad_result"] | None = (
        None
    )
    """None when the tool ran and answered."""
    step: Step | None = None
    """Set when the tool returned a `Step`: reward, end."""
    coerced: int = 0
    """How many numbers were taken as the text of a ``str`` parameter."""
    seconds: float = 0.0
