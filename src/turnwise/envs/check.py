"""Check an environment before training on it, in the manner of Gymnasium's ``check_env``.

    turnwise env check catch
    turnwise env check path.py:Shopping --arg markup=2

    report = asyncio.run(check(make("catch")))
    assert report.ok, report

What costs a training run most is what nobody sees: a seed that does nothing, state that survives reset, a
teacher who is paid less than nonsense, a tool that takes a second. Each finding names the rule, what was
found and what to do.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from typing import Any, Literal

from turnwise.envs.play import Play
from turnwise.envs.probes import extremes, garbage, legal_reply
from turnwise.envs.session import EnvSpec, Session
from turnwise.envs.spec import ClassSpec
from turnwise.errors import EnvError, ScoringError, TaskError, TurnwiseError
from turnwise.types import Message, Task

Level = Literal["ok", "warning", "error"]
Player = Callable[[Play], Awaitable[Message]]
"""From an episode to the next reply."""

TURNS = 50
"""Replies after which a scripted episode is given up."""
ROWS = 2000
"""Task rows of each split that are looked at."""
SLOW = 0.25
"""Seconds of a call, in the median, that are worth a warning: a rollout waits for each of them."""
BLOCKING = 0.02
"""Seconds of a call, in the median, that an environment that runs on the event loop should not take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one rule found."""

    level: Level
    rule: str
    """``tasks``, ``open``, ``tools``, ``reset``, ``seed``, ``isolation``, ``reward``, ``teacher``,
    ``garbage``, ``time``.
    """
    message: str


@dataclass(slots=True)
class Report:
    """Everything that was found, in the order in which it was looked for."""

    env: str
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """How long each call took, by kind."""

    @property
    def ok(self) -> bool:
        """Whether there are no errors; warnings are for the author to weigh."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """The findings that must be mended."""
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that the author should weigh."""
        return [finding for finding in self.findings if finding.level == "warning"]

    def add(self, level: Level, rule: str, message: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(level=level, rule=rule, message=message))

    def __str__(self) -> str:
        """One line a finding."""
        return "\n".join(f"{finding.level:8}{finding.rule:10}{finding.message}" for finding in self.findings)


async def check(spec: EnvSpec, *, episodes: int = 8, seed: int = 0) -> Report:
    """Look for everything that would spoil a run.

    Args:
        spec: The environment.
        episodes: How many tasks of each split the teacher and the random player play.
        seed: Of the scripted players and of the episodes.

    Returns:
        The findings. Faults of the environment are findings and not exceptions.
    """
    report = Report(spec.name)
    checker = _Checker(spec, report, seed)
    rule = "tasks"
    try:
        rows = checker.check_tasks()
        rule = "open"
        session = await spec.open(spec.limits)
        try:
            checker.check_tools(session)
            rule = "reset"
            await checker.check_first(session, rows[0])
            tasks = rows_apart(rows, 2 * episodes)
            rule = "seed"
            await checker.check_same(tasks[:2])
            rule = "isolation"
            await checker.check_isolation(session, tasks)
            rule = "reward"
            best = await checker.check_players(session, tasks)
        finally:
            await session.close()
            await session.close()  # Twice: an episode that was cancelled may find it closed already.
        rule = "garbage"
        await checker.check_garbage(tasks[0], best)
        checker.check_time()
    except ScoringError as error:
        report.add("error", "reward", str(error))
    except TurnwiseError as error:
        report.add("error", rule, str(error))
    return report


def rows_apart(rows: Sequence[Task], count: int) -> list[Task]:
    """``count`` of the rows, evenly spread; all where there are fewer."""
    if len(rows) <= count:
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]


def _json_problem(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return f"is no JSON object but a {type(row).__name__}"
    try:
        again = json.loads(json.dumps(dict(row), allow_nan=False))
    except (TypeError, ValueError) as error:
        return f"is not JSON: {error}"
    return None if again == dict(row) else "changes in JSON: it holds tuples, or keys that are no strings"


class _Checker:
    """One method for each rule. What a rule cannot survive is raised, and is the last finding."""

    def __init__(self, spec: EnvSpec, report: Report, seed: int) -> None:
        self.spec, self.report, self.seed = spec, report, seed
        self.has_teacher = False

    def check_tasks(self) -> list[Task]:
        """Rows are JSON, and the held-out ones are not among those to train on. Returns rows of all
        splits.
        """
        rows = {"train": list(islice(self.spec.tasks("train"), ROWS))}
        try:
            rows["test"] = list(islice(self.spec.tasks("test"), ROWS))
        except TaskError as error:
            self.report.add("warning", "tasks", f"nothing can be evaluated: {error}")
        for split, part in rows.items():
            for index, row in enumerate(part):
                if (problem := _json_problem(row)) is not None:
                    raise TaskError(f"row {index} of split {split!r} {problem}")
        found = [row for part in rows.values() for row in part]
        if not found:
            raise TaskError("there is no row to play: yield JSON objects from tasks(split)")
        # Empty rows say that the seed is all that tells episodes apart.
        train = {json.dumps(dict(row), sort_keys=True) for row in rows["train"] if row}
        test = rows.get("test", [])
        if shared := sum(json.dumps(dict(row), sort_keys=True) in train for row in test):
            found_shared = f"{shared} of {len(test)} test rows are train rows too"
            self.report.add("warning", "tasks", f"{found_shared}: a held-out score says little")
        counts = [f"{len(part)}{'+' if len(part) == ROWS else ''} {split}" for split, part in rows.items()]
        self.report.add("ok", "tasks", f"rows are JSON: {', '.join(counts)}")
        return found

    def check_tools(self, session: Session) -> None:
        """Each tool tells the model what it does, and each parameter what it takes."""
        before = len(self.report.findings)
        for tool in session.tools:
            if not tool.description.strip():
                self.report.add("warning", "tools", f"{tool.name} has no description")
            for name, part in tool.parameters.get("properties", {}).items():
                if not set(part) & {"type", "enum", "const", "anyOf", "oneOf", "$ref"}:
                    self.report.add("warning", "tools", f"{tool.name}: parameter {name} has no type")
        if len(self.report.findings) == before:
            names = ", ".join(tool.name for tool in session.tools)
            self.report.add("ok", "tools", f"described and typed: {names}" if names else "none")

    async def check_first(self, session: Session, task: Task) -> None:
        """The first reset shows something, and a teacher says something or is not there."""
        first = await Play(session, self.spec.limits).start(task, self.seed)
        if not any(message.content for message in first):
            raise EnvError("the policy is shown nothing: return its first message from reset")
        self.report.add("ok", "reset", f"first message {_short(first[-1].text)}")
        try:
            await session.teacher(first)
            self.has_teacher = True
        except EnvError as error:
            # A teacher that raised has a cause; one that is not there, or that says it cannot teach this, has
            # none.
            self.report.add("error" if error.__cause__ else "ok", "teacher", str(error))

    async def check_same(self, tasks: Sequence[Task]) -> None:
        """The same task and seed give the same episode on two instances: siblings of a group depend on it."""
        for task in tasks:
            seen = [await self._fresh_transcript(task, self.seed) for _ in range(2)]
            if seen[0] != seen[1]:
                what = "on two instances, the same task and seed went apart"
                self.report.add("error", "seed", f"{what}: {_difference(*seen)}. Use self.rng for all chance")
                return
        self.report.add("ok", "seed", "same task, same seed, same replies: same episode")

    async def check_isolation(self, session: Session, tasks: Sequence[Task]) -> None:
        """Nothing of an episode survives reset."""
        await self._transcript(session, tasks[-1], self.seed + 1)
        used = await self._transcript(session, tasks[0], self.seed)
        fresh = await self._fresh_transcript(tasks[0], self.seed)
        if used == fresh:
            self.report.add("ok", "isolation", "a second episode equals one on a fresh instance")
            return
        what = "after an earlier episode, an instance played differently from a fresh one"
        self.report.add("error", "isolation", f"{what}: {_difference(used, fresh)}. Set all state in reset")

    async def check_players(self, session: Session, tasks: Sequence[Task]) -> float | None:
        """Rewards are numbers, and the teacher earns the most. Returns the most that a player earned."""
        rng = random.Random(self.seed)
        players: dict[str, Player] = {"random play": lambda play: _legal(play, rng)}
        if self.has_teacher:
            players = {"teacher": _teach, **players}
        earned: dict[str, list[float]] = {name: [] for name in players}
        for index, task in enumerate(tasks):
            for name, player in players.items():
                reward, _ = await self._episode(session, task, self.seed + index, player)
                earned[name].append(0.0 if reward is None else reward)
        best = max(max(rewards) for rewards in earned.values())
        means = {name: statistics.fmean(rewards) for name, rewards in earned.items()}
        text = ", ".join(f"{name} {mean:.3g}" for name, mean in means.items())
        self.report.add("ok", "reward", f"means over {len(tasks)} tasks: {text}")
        if not self.has_teacher:
            return best
        if means["teacher"] < means["random play"]:
            self.report.add("error", "teacher", f"it earns less than random play ({text})")
        elif best <= 0 and means["teacher"] <= min(earned["random play"]):
            self.report.add("warning", "teacher", "it earns nothing, and nor does random play")
        elif (least := min(earned["teacher"])) < best:
            where = _short(tasks[earned["teacher"].index(least)])
            found = f"it earns {least:.3g} on {where}, the best episode of all {best:.3g}"
            self.report.add("warning", "teacher", f"{found}: does it err?")
        else:
            self.report.add("ok", "teacher", f"it earns the top reward, {best:.3g}, on every task")
        return best

    async def check_garbage(self, task: Task, best: float | None) -> None:
        """Nothing that a policy can say breaks the environment, or pays more than playing well."""
        before = len(self.report.errors)
        session = await self.spec.open(self.spec.limits)
        try:
            legal = extremes(session.tools)
            probes = {**garbage(session.tools), **legal}
            for name, message in probes.items():
                try:
                    reward, play = await self._episode(session, task, self.seed, partial(_say, message))
                except TurnwiseError as error:
                    self.report.add("error", "garbage", f"{name}: {error}")
                    await session.close()
                    session = await self.spec.open(self.spec.limits)
                    continue
                if message.tool_calls and name not in legal and len(play.tool_errors) < play.tool_calls:
                    self.report.add("error", "garbage", f"{name}: the call was accepted")
                if reward is not None and best is not None and reward > max(best, 0.0):
                    self.report.add("error", "garbage", f"{name} was paid {reward:g}, the best {best:g}")
                elif reward is not None and best is not None and self.has_teacher and reward == best > 0:
                    self.report.add("warning", "garbage", f"{name} was paid {reward:g}, like the teacher")
        finally:
            await session.close()
        if len(self.report.errors) == before:
            self.report.add("ok", "garbage", f"{len(probes)} kinds of nonsense were answered, none paid more")

    def check_time(self) -> None:
        """Calls are quick enough not to hold up a rollout."""
        middles = {kind: statistics.median(times) for kind, times in self.report.seconds.items()}
        inline = isinstance(self.spec, ClassSpec) and self.spec.env_class.inline
        for kind, middle in middles.items():
            found = f"{kind} takes {_duration(middle)}"
            if middle > SLOW:
                self.report.add("warning", "time", f"{found}: rollouts wait for it")
            elif inline and middle > BLOCKING:
                self.report.add(
                    "warning", "time", f"{found} and blocks the event loop: remove `inline = True`"
                )
        shown = ", ".join(f"{kind} {_duration(middle)}" for kind, middle in middles.items())
        slowest = max(max(times) for times in self.report.seconds.values())
        self.report.add("ok", "time", f"{shown} in the median; slowest {_duration(slowest)}")

    async def _episode(
        self, session: Session, task: Task, seed: int, player: Player
    ) -> tuple[float | None, Play]:
        """Play to the end; an episode that has none is given up after some turns."""
        play = Play(session, self.spec.limits)
        await play.start(task, seed)
        while play.stop is None and play.turns < TURNS:
            await play.say(await player(play))
        reward = await play.reward()
        for kind, times in play.seconds.items():
            self.report.seconds[kind] += times
        if reward is not None and not math.isfinite(reward):
            raise ScoringError(f"the episode of {_short(task)} was paid {reward}")
        return reward, play

    async def _transcript(self, session: Session, task: Task, seed: int) -> list[str]:
        """What the environment says and pays in an episode of random play, and in one of its teacher's."""
        rng = random.Random(f"{self.seed}/transcript")
        players: list[Player] = [lambda play: _legal(play, rng)]
        if self.has_teacher:
            players.append(_teach)
        out: list[str] = []
        for player in players:
            reward, play = await self._episode(session, task, seed, player)
            out += [f"{message.role}: {message.content}" for message in play.messages]
            out += [f"stop: {play.stop}", f"reward: {reward}"]
        return out

    async def _fresh_transcript(self, task: Task, seed: int) -> list[str]:
        session = await self.spec.open(self.spec.limits)
        try:
            return await self._transcript(session, task, seed)
        finally:
            await session.close()


async def _teach(play: Play) -> Message:
    return await play.session.teacher(play.messages)


async def _legal(play: Play, rng: random.Random) -> Message:
    return legal_reply(play.session.tools, rng)


async def _say(message: Message, _: Play) -> Message:
    return message


def _difference(one: list[str], other: list[str]) -> str:
    """Where two transcripts part."""
    for left, right in zip_longest(one, other, fillvalue="nothing"):
        if left != right:
            return f"{_short(left)} against {_short(right)}"
    return "no difference"


def _short(value: Any, limit: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return f"`{text if len(text) <= limit else text[: limit - 1] + '…'}`"


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
