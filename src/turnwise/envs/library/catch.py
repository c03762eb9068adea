"""Catch: a ball falls through rows × columns, a paddle at the bottom goes to meet it. OpenSpiel's rules.

    turnwise env play catch --arg rows=6
    turnwise env check catch --arg wind=0.3

Rules as in OpenSpiel's ``catch.cc``: the ball starts in the top row, in a column drawn by chance, the paddle
in the middle of the bottom row; each move takes the paddle one column left, right or nowhere (walls stop it)
and the ball one row down; the game ends when the ball is in the bottom row. OpenSpiel pays 1 or -1 there;
``miss_reward=-1`` does the same, 0 is our default so that the reward is the share of balls caught.

    1 . . . o .      ball 3 paddle 2 rows 2
    2 . . . . .
    3 . . = . .      paddle
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from turnwise.envs.base import Env, tool
from turnwise.envs.library.splits import TEST, checked, split_of
from turnwise.types import Message, Step, Task, ToolCall

Direction = Literal["left", "stay", "right"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

TEST_SHARE = 0.2
"""Share of the ball's paths that are held out where there is wind."""


class Catch(Env):
    """Catch the falling ball.

    A row is ``{"column": 3, "seed": 17}``: where the ball starts, and the seed of its path. Without wind the
    start column is all there is, so train and test share the same few games and a held-out score says how
    well the policy plays, not how well it generalises. With ``wind`` the ball also drifts, and test rows hold
    paths that no train row has.

    Args:
        rows: Rows of the board; an episode has ``rows - 1`` moves (more than 32 need a higher ``max_turns``).
        columns: Columns of the board.
        miss_reward: Paid for a missed ball; -1 is OpenSpiel's.
        wind: Probability, at each row, that the ball drifts one column left or right as it falls. No longer
            OpenSpiel's game, and then not even perfect play from what is seen catches every ball.
        observation: ``text`` is ``ball 3 paddle 1 rows 4`` (columns from 0, rows still to fall); ``grid`` a
            drawing.
        size: Rows per split.
        error: The teacher's probability of an error at each move.
        error_kind: What the teacher does then: ``random`` is one of the two other moves; ``stay`` is
            systematic, so that its imitator learns a bias and not only noise.
    """

    inline = True
    max_turns = 32

    def __init__(
        self,
        rows: int = 10,
        columns: int = 5,
        *,
        miss_reward: float = 0.0,
        wind: float = 0.0,
        observation: Literal["text", "grid"] = "text",
        size: int = 500,
        error: float = 0.0,
        error_kind: Literal["random", "stay"] = "random",
    ) -> None:
        if columns < 1 or rows - 1 < max(1, columns // 2):
            raise ValueError(
                f"catch with rows={rows}, columns={columns}: the paddle must be able to reach every column, "
                f"which takes at least {max(1, columns // 2) + 1} rows and one column"
            )
        if not (0 <= wind <= 1 and 0 <= error <= 1):
            raise ValueError(
                f"wind and error are probabilities from 0 to 1; found wind={wind}, error={error}"
            )
        if observation not in ("text", "grid"):
            raise ValueError(f"observation={observation!r}; allowed are 'text' and 'grid'")
        if error_kind not in ("random", "stay"):
            raise ValueError(f"error_kind={error_kind!r}; allowed are 'random' and 'stay'")
        self.rows, self.columns = rows, columns
        self.miss_reward, self.wind = miss_reward, wind
        self.observation, self.size = observation, size
        self.error, self.error_kind = error, error_kind

    def tasks(self, split: str) -> Iterator[Task]:
        """``size`` rows, start columns evenly spread; seeds count up, so rows differ even where games do
        not.
        """
        split = checked(split, "catch")
        if not self.wind:
            first = self.size if split == TEST else 0
            for seed in range(first, first + self.size):
                yield {"column": seed % self.columns, "seed": seed}
            return
        made, seed = 0, 0
        while made < self.size:
            column = made % self.columns
            if split_of(str(self._path(column, seed)), TEST_SHARE) == split:
                yield {"column": column, "seed": seed}
                made += 1
            seed += 1

    def reset(self, task: Task) -> str:
        """Put the ball into the top row and the paddle into the middle."""
        self.path = self._path(task["column"], task["seed"])
        self.row = 0
        self.paddle = self.columns // 2
        # The teacher's errors are drawn apart from everything else, so that they never change the game.
        self.teacher_rng = random.Random(self.rng.getrandbits(64))
        return self._look()

    @tool
    def move(self, direction: Direction) -> Step:
        """Move the paddle one column, or let it stay; the ball falls one row. Column 0 is at the left."""
        shift = DIRECTIONS.index(direction) - 1
        self.paddle = min(max(self.paddle + shift, 0), self.columns - 1)
        self.row += 1
        if self.row < self.rows - 1:
            return Step(self._look())
        caught = self.path[-1] == self.paddle
        return Step(
            "caught" if caught else "missed",
            reward=1.0 if caught else self.miss_reward,
            terminated=True,
        )

    def teacher(self, messages: Sequence[Message]) -> Message:
        """Go to where the ball will land (wind included), erring as it was told to."""
        target = self.path[-1]
        best: Direction = "left" if target < self.paddle else "right" if target > self.paddle else "stay"
        if self.teacher_rng.random() >= self.error:
            return _say(best)
        if self.error_kind == "stay":
            return _say("stay")
        return _say(self.teacher_rng.choice([direction for direction in DIRECTIONS if direction != best]))

    def state_key(self) -> str:
        """Ball, paddle and row: all that the rest of the game depends on, for one path."""
        return f"{self.path[self.row]} {self.paddle} {self.row}"

    def random_reply(self, rng: random.Random) -> Message:
        """Any of the three moves. Without wind this catches one ball in ``columns``."""
        return _say(rng.choice(DIRECTIONS))

    def constant_reply(self) -> Message:
        """Stay: right for the balls that fall in the middle."""
        return _say("stay")

    def _path(self, column: int, seed: int) -> tuple[int, ...]:
        """The ball's column in each row, from the top."""
        if not 0 <= column < self.columns:
            raise ValueError(f"the task starts the ball in column {column} of a board with {self.columns}")
        path = [column]
        chance = random.Random(f"{column}/{seed}")
        for _ in range(self.rows - 1):
            drift = chance.choice((-1, 1)) if self.wind and chance.random() < self.wind else 0
            path.append(min(max(path[-1] + drift, 0), self.columns - 1))
        return tuple(path)

    def _look(self) -> str:
        if self.observation == "text":
            return f"ball {self.path[self.row]} paddle {self.paddle} rows {self.rows - 1 - self.row}"
        board = [["."] * self.columns for _ in range(self.rows)]
        board[-1][self.paddle] = "="
        board[self.row][self.path[self.row]] = "o"
        return "\n".join(" ".join(line) for line in board)


def _say(direction: Direction) -> Message:
    return Message.assistant("", ToolCall(name="move", arguments={"direction": direction}))
