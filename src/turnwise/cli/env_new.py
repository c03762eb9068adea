"""``turnwise env new``: a small environment that is complete, its test, and the package around them."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from turnwise.errors import EnvSpecError

ENVIRONMENT = '''"""{title}: say what a basket of things costs.

    turnwise env check {module}.py:{class_name}
    turnwise env play {module}.py:{class_name} --teacher
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from turnwise.envs import Env, Message, Step, ToolCall, tool

PRICES = {{"bread": 240, "butter": 310, "jam": 275, "milk": 95, "salt": 60, "tea": 420}}


class {class_name}(Env):
    """Look up the price of each thing, then answer with the sum.

    Args:
        things: How many things are in a basket.
    """

    max_turns = 8  # replies; an episode that needs more is cut short and scored as it stands
    inline = True  # no method ever blocks; remove this where one reads files, sleeps or asks a server

    def __init__(self, things: int = 2) -> None:
        self.things = things

    def tasks(self, split: str) -> list[dict[str, object]]:
        """One JSON row for each basket; a fifth of them is held out."""
        baskets = list(itertools.combinations(sorted(PRICES), self.things))
        random.Random(0).shuffle(baskets)
        held_out = max(len(baskets) // 5, 1)
        chosen = baskets[:held_out] if split == "test" else baskets[held_out:]
        return [{{"basket": list(basket)}} for basket in chosen]

    def reset(self, task: dict[str, list[str]]) -> str:
        """Start an episode: set all state here, and say what the policy sees first."""
        self.basket = task["basket"]
        self.looked_up: dict[str, int] = {{}}
        return f"What do these cost together: {{', '.join(self.basket)}}?"

    @tool
    def price(self, item: str) -> int:
        """Look up the price of one thing, in cents."""
        if item not in PRICES:
            raise ValueError(f"there is no {{item}} here")  # the policy is told, and may try again
        self.looked_up[item] = PRICES[item]
        return PRICES[item]

    @tool
    def answer(self, total: int) -> Step:
        """Answer with the sum, in cents. This ends the task."""
        right = total == sum(PRICES[item] for item in self.basket)
        return Step("right" if right else "wrong", reward=float(right), terminated=True)

    def teacher(self, messages: Sequence[Message]) -> Message:
        """What a demonstrator would do next: SFT learns from it, `turnwise env check` plays it."""
        for item in self.basket:
            if item not in self.looked_up:
                return Message.assistant("", ToolCall(name="price", arguments={{"item": item}}))
        total = sum(self.looked_up[item] for item in self.basket)
        return Message.assistant("", ToolCall(name="answer", arguments={{"total": total}}))
'''

TEST = '''"""What {class_name} promises."""

from __future__ import annotations

import asyncio
from pathlib import Path

from turnwise.envs.check import check
from turnwise.envs.registry import make

SPEC = f"{{Path(__file__).parent{up} / '{module}.py'}}:{class_name}"


def test_nothing_would_spoil_a_run():
    report = asyncio.run(check(make(SPEC)))
    assert report.ok, report


def test_held_out_tasks_are_not_trained_on():
    spec = make(SPEC)
    train, test = ([row["basket"] for row in spec.tasks(split)] for split in ("train", "test"))
    assert test and not [basket for basket in test if basket in train]
'''


TAKEN = frozenset({"Env", "Message", "Sequence", "Step", "ToolCall"})
"""Names that the environment's file imports."""


def scaffold(name: str, directory: Path, *, package: bool = True) -> tuple[list[Path], str]:
    """Write an environment; returns the paths of what was written, its own first, and its class's name.

    Args:
        name: In snake_case.
        directory: Where to write it.
        package: Into a folder ``<name>`` that is an OpenEnv package too; else ``<name>.py`` and
            ``test_<name>.py`` alone.

    Raises:
        EnvSpecError: The name cannot be a module's, or a file is there already.
    """
    from turnwise.openenv.scaffold import package_files

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise EnvSpecError(
            f"{name!r} cannot name a module: use lower-case letters, digits and _, as in web_shop"
        )
    class_name = "".join(part.capitalize() for part in name.split("_"))
    if keyword.iskeyword(class_name) or class_name in TAKEN:
        raise EnvSpecError(
            f"{name!r} would name the class {class_name}, which means something else in that file; "
            f"choose another name, such as my_{name}"
        )
    module = "environment" if package else name
    up = ".parent" if package else ""
    words = {
        "module": module,
        "class_name": class_name,
        "title": name.replace("_", " ").capitalize(),
        "up": up,
    }
    test = f"tests/test_{name}.py" if package else f"test_{name}.py"
    texts = {f"{module}.py": ENVIRONMENT.format(**words).encode(), test: TEST.format(**words).encode()}
    if package:
        directory = directory / name
        texts |= package_files(name, class_name)
    for path in [directory] if package else [directory / inside for inside in texts]:
        if path.exists():
            raise EnvSpecError(f"{path} is there already; choose another name or remove it")
    for inside, text in texts.items():
        (directory / inside).parent.mkdir(parents=True, exist_ok=True)
        (directory / inside).write_bytes(text)
    return [directory / inside for inside in texts], class_name
