"""`Env` and `@tool`: everything that an author of an environment has to know.

    class Shopping(Env):
        max_turns = 5

        def tasks(self, split):
            return [{"item": "tea", "price": 3}, {"item": "jam", "price": 4}]

        def reset(self, task):
            self.task = task
            return f"What does {task['item']} cost? Look it up, then answer with the number alone."

        @tool
        def price(self, item: str) -> int:
            "Look up the price of an item."
            return {"tea": 3, "jam": 4}[item]

        def step(self, reply):
            return Step(reward=float(reply.strip() == str(self.task["price"])), terminated=True)

Play it by hand with ``turnwise env play path.py:Shopping``; check it with ``turnwise env check`` likewise.
Every method may be ``async``. How they are run, timed and isolated is `turnwise.envs.host`.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, overload

from turnwise.types import Content, Message, Step, Task

if TYPE_CHECKING:
    from turnwise.envs.tools import Tool

F = TypeVar("F", bound=Callable[..., Any])

T = TypeVar("T")
MaybeAsync = Union[T, Awaitable[T]]  # noqa: UP007 - a bare `T | …` is no alias to type checkers
"""What a method may return: an author's method may be ``async``."""

TOOL_MARK = "__turnwise_tool__"
"""Attribute that `tool` sets on a method: the name under which the model calls it."""


@overload
def tool(method: F, /) -> F: ...
@overload
def tool(*, name: str) -> Callable[[F], F]: ...
def tool(method: F | None = None, /, *, name: str | None = None) -> F | Callable[[F], F]:
    """Mark a method as a tool. Its schema comes from the signature and the docstring.

    Parameters need type hints; the docstring's text describes the tool and a Google-style ``Args:`` section,
    where there is one, its parameters. The tool returns text, JSON values, content blocks, or a `Step` to pay
    or to end. What it raises is told to the model.

    Args:
        method: The method, when used as ``@tool``.
        name: Another name for the model to call it by, when used as ``@tool(name="…")``.
    """

    def mark(method: F) -> F:
        setattr(method, TOOL_MARK, name or method.__name__)
        return method

    return mark if method is None else mark(method)


class Env:
    """One environment, and one live episode of it at a time.

    Only `reset` is required, along with one of: tools, `step`, `reward`. An instance may be reset again for
    another episode; nothing but what `reset` sets should survive.
    """

    system: ClassVar[str | None] = None
    """A system message put before what `reset` returns."""
    max_turns: ClassVar[int | None] = None
    """Replies per episode; None leaves it to the recipe."""
    max_tool_calls: ClassVar[int | None] = None
    """Tool calls per episode; None sets no limit."""
    forfeit: ClassVar[float] = 0.0
    """What an end is worth that cannot be scored: the policy made a call hang, crashed the environment, broke
    `reward` or a reward function; or, where there is no `reward`, left before the environment ended the
    episode. Set it to the least that an end can be worth, reward functions included, where that is below 0.
    """
    inline: ClassVar[bool] = False
    """Declares that no method ever blocks: methods run on the event loop itself, the fastest way."""
    isolation: ClassVar[Literal["thread", "process"]] = "thread"
    """Where sync methods run: a thread of their own for the environment's life, or a killable process."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Here and not at first use: a tool without type hints is an error where it is written.
        cls.toolset()

    rng: random.Random
    """Seeded before every `reset`; the only source of chance that an environment should use."""

    def tasks(self, split: str) -> Iterable[Task]:
        """The tasks of ``split`` (``train`` or ``test``), one JSON row each; by default one empty row."""
        return [{}]

    def reset(self, task: Task) -> MaybeAsync[Content | list[Message]]:
        """Start an episode; the return value is the first message, or messages, that the policy sees."""
        raise NotImplementedError(f"{type(self).__name__} must define reset(self, task)")

    def step(self, reply: str) -> MaybeAsync[Step]:
        """Answer a reply that called no tool. Without this method such a reply ends the episode."""
        raise NotImplementedError

    def reward(self) -> MaybeAsync[float | Mapping[str, float | None]]:
        """The episode's reward, asked for once at its end, truncated or not; named where it is a mapping, and
        None in it where a reward does not apply to this episode.

        It is added to what the steps paid. Without this method the steps' rewards are all there is.
        """
        raise NotImplementedError

    def teacher(self, messages: Sequence[Message]) -> MaybeAsync[Message | str]:
        """What a demonstrator would say now; it sees the private state."""
        raise NotImplementedError

    def state_key(self) -> MaybeAsync[str]:
        """A key that is equal for equal states of one task, for credit by turn."""
        raise NotImplementedError

    def close(self) -> MaybeAsync[None]:
        """Free what the environment holds. Always called, once, after the last episode."""

    @classmethod
    def toolset(cls) -> Sequence[Tool]:
        """The class's tools. Adapters of other people's classes override it; authors have no need to."""
        from turnwise.envs.tools import tools_of

        return tools_of(cls)
