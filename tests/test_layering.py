"""The rooms and who may enter them (docs/architecture.md), read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src/turnwise"

FREE = {"types", "errors"}
"""Every room may import these."""
STAGES = {"envs", "openenv", "chat", "engines", "rollout", "learn", "view", "store", "config", "recipe"}
"""What stages are made of."""
TABLE: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "config": set(),
    "recipe_yaml": set(),
    "recipe_rules": {
        "config",
        "recipe_rules_credit",
        "recipe_rules_engine",
        "recipe_rules_loss",
        "recipe_rules_selection",
    },
    "recipe_rules_credit": {"config"},
    "recipe_rules_engine": {"config"},
    "recipe_rules_loss": {"config"},
    "recipe_rules_selection": {"config"},
    "recipe": {"config", "recipe_rules", "recipe_yaml"},
    "recipe_docs": {"config", "recipe_yaml"},
    "codec": set(),
    "journal": set(),
    "checkpoints": {"journal"},
    "images": {"journal"},
    "store": {"config", "checkpoints", "codec", "images", "journal"},
    "envs": {"config", "images"},
    "openenv": {"envs", "config", "images"},
    "chat": {"images"},
    "engines": {"chat"},
    "rollout": {"envs", "chat", "config", "engines.base", "images"},
    "learn": {"chat", "config", "store", "checkpoints", "images"},
    "view": {"store", "config", "recipe", "codec", "journal"},
    "pipeline": {*STAGES, "codec"},
    "compat": {*STAGES, "pipeline", "recipe_rules", "checkpoints", "codec", "images", "journal"},
    "cli": {*STAGES, "pipeline"},
    "__main__": {"cli"},
    "": {"envs", "openenv"},
}
"""Room → what it may import of Turnwise, beside itself, types and errors. "" is the package itself."""

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "datasets",
    "huggingface_hub",
    "accelerate",
}
HEAVY_ROOMS = {"learn", "engines", "compat"}
"""Where heavy libraries are at home: TRL's arguments are a dataclass of transformers', its callbacks' events
are its Trainer's. Elsewhere they are imported lazily, inside of functions, if at all."""
LAZY_ROOMS = {"chat", "pipeline", "cli", "openenv"}
"""May import heavy libraries inside of functions."""
TORCHLESS = {
    "chat",
    "rollout",
    "envs",
    "openenv",
    "view",
    "store",
    "config",
    "recipe",
    "codec",
    "images",
    "journal",
}
"""May not import torch, not even lazily."""


@dataclass(frozen=True)
class Import:
    """One import of one module."""

    file: Path
    line: int
    module: str
    lazy: bool
    """Inside of a function."""
    typing: bool
    """Under ``if TYPE_CHECKING``."""

    def __str__(self) -> str:
        return f"{self.file.relative_to(SRC)}:{self.line} imports {self.module}"

    @property
    def room(self) -> str:
        return room(self.file)


def room(file: Path) -> str:
    """A file's room: its folder, or its own name where it stands beside the rooms."""
    parts = file.relative_to(SRC).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, lazy, typing)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: imports are absolute"
                # `from turnwise.engines import base` enters engines.base: each name is a module of its own.
                for alias in child.names:
                    inner = SRC.parent.joinpath(*f"{child.module}.{alias.name}".split("."))
                    deep = inner.is_dir() or inner.with_suffix(".py").is_file()
                    module = f"{child.module}.{alias.name}" if deep else str(child.module)
                    yield Import(file, child.lineno, module, lazy, typing)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from visit(child, lazy, True)
            else:
                inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, inside, typing)

    return visit(tree, False, False)


FILES = sorted(SRC.rglob("*.py"))
IMPORTS = [one for file in FILES for one in imports(file)]


def allowed(one: Import) -> bool:
    """Whether the table lets this import of Turnwise's own be."""
    target = one.module.removeprefix("turnwise").removeprefix(".")
    first = target.split(".")[0]
    if first == one.room or first in FREE:
        return True
    return any(target == name or target.startswith(name + ".") for name in TABLE[one.room])


def test_every_room_is_in_the_table() -> None:
    assert {room(file) for file in FILES} <= TABLE.keys()


def test_rooms_import_only_what_the_table_allows() -> None:
    own = [one for one in IMPORTS if one.module.split(".")[0] == "turnwise" and one.room != ""]
    assert len(own) > 100
    assert [str(one) for one in own if not allowed(one)] == []


def test_heavy_libraries_stay_at_home() -> None:
    heavy = [
        one
        for one in IMPORTS
        if one.module.split(".")[0] in HEAVY and not one.typing and one.room not in HEAVY_ROOMS
    ]
    assert [str(one) for one in heavy if not (one.lazy and one.room in LAZY_ROOMS)] == []


def test_torch_is_out_of_the_light_rooms() -> None:
    torch = [one for one in IMPORTS if one.module.split(".")[0] == "torch" and one.room in TORCHLESS]
    assert [str(one) for one in torch] == []


def test_the_engine_protocol_needs_no_library() -> None:
    for name in ("base.py", "scripted.py"):
        assert [
            str(one) for one in imports(SRC / "engines" / name) if one.module.split(".")[0] in HEAVY
        ] == []


def test_trl_is_only_a_referee() -> None:
    assert [str(one) for one in IMPORTS if one.module.split(".")[0] in ("trl", "openenv")] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_a_file_is_one_noun(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{lines} lines: past some 400 a file is two nouns"


def test_foreign_errors_are_caught_at_the_boundary_alone() -> None:
    """A broad ``except`` elsewhere states its reason on its line, or the line above."""
    bare = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "BaseException"
            broad = any(name in caught.replace("(", " ").replace(",", " ").split() for name in ("Exception",))
            # BaseException is only caught to clean up and raise again, which the linter's BLE rule checks.
            reason = "#" in lines[node.lineno - 1] or lines[node.lineno - 2].strip().startswith("#")
            reason = reason or lines[node.lineno].strip().startswith("#")
            if broad and not reason and file.name != "errors.py":
                bare.append(f"{file.relative_to(SRC)}:{node.lineno}")
    assert bare == []


def test_nothing_is_printed() -> None:
    """But where printing is what a function is for, which its line says."""
    calls = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        calls += [
            f"{file.relative_to(SRC)}:{node.lineno}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and "# noqa: T201 - " not in lines[node.lineno - 1]
        ]
    assert calls == []
