"""Schemas from signatures and docstrings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, NewType, NotRequired, TypedDict

import pytest
from pydantic import BaseModel, Field

from turnwise import Env, tool
from turnwise.envs.schema import describe_function, describe_hint, explicit_schema, parse_docstring
from turnwise.envs.tools import tools_of
from turnwise.errors import EnvSpecError


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: int
    y: int = 0


class Item(TypedDict):
    name: str
    count: NotRequired[int]


class Order(BaseModel):
    class Line(BaseModel):
        item: str
        amount: int = Field(ge=1)

    lines: list[Line]


UserId = NewType("UserId", str)

HINTS: list[tuple[Any, dict[str, Any]]] = [
    (str, {"type": "string"}),
    (int, {"type": "integer"}),
    (float, {"type": "number"}),
    (bool, {"type": "boolean"}),
    (None, {"type": "null"}),
    (Any, {}),
    (UserId, {"type": "string"}),
    (Literal["left", "right"], {"type": "string", "enum": ["left", "right"]}),
    (Literal[1, "a"], {"type": ["integer", "string"], "enum": [1, "a"]}),
    (Color, {"type": "string", "enum": ["red", "blue"]}),
    (list, {"type": "array"}),
    (list[int], {"type": "array", "items": {"type": "integer"}}),
    (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
    (dict, {"type": "object"}),
    (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
    (int | None, {"type": "integer", "nullable": True}),
    (str | int, {"type": ["integer", "string"]}),
    (
        list[int] | str,
        {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
    ),
    (Annotated[int, "how many", Field(ge=1, lt=9)],
     {"type": "integer", "description": "how many", "minimum": 1, "exclusiveMaximum": 9}),
    (Point, {
        "type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
        "additionalProperties": False, "required": ["x"],
    }),
    (Item, {
        "type": "object", "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
        "additionalProperties": False, "required": ["name"],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "schema"), HINTS, ids=lambda value: str(value)[:40])
def test_hint(hint, schema):
    hint = type(None) if hint is None else hint
    assert describe_hint(hint, "here")[0] == schema


@pytest.mark.parametrize("hint", [bytes, set[int], dict[int, str], complex, object, Literal[b"x"]])
def test_a_hint_that_no_json_value_satisfies(hint):
    with pytest.raises(EnvSpecError, match="tool f: parameter 'x'"):
        describe_hint(hint, "tool f: parameter 'x'")


def buy(self, item: str, count: int = 1, color: Color = Color.RED, note: str | None = None) -> str:
    """Buy something.

    Costs money.

    Args:
        item (str): What to buy, by
            its name.
        count: How many.

    Returns:
        A receipt.
    """


def test_signature_and_docstring():
    schema = describe_function(buy).schema
    assert schema.name == "buy"
    assert schema.description == "Buy something.\n\nCosts money."
    assert schema.parameters == {
        "type": "object",
        "properties": {
            "item": {"type": "string", "description": "What to buy, by its name."},
            "count": {"type": "integer", "description": "How many.", "default": 1},
            "color": {"type": "string", "enum": ["red", "blue"], "default": "red"},
            "note": {"type": "string", "nullable": True},
        },
        "required": ["item"],
    }


def test_equals_what_transformers_makes_for_its_own_kind_of_docstring():
    from transformers.utils import get_json_schema

    def search(
        self, query: str, kind: Literal["a", "b"], tags: list[str], near: tuple[int, int] | None,
        scores: dict[str, float], limit: int | float,
    ) -> str:  # fmt: skip
        """Search.

        Args:
            query: What to look for.
            kind: Which kind.
            tags: Some
                tags.
            near: Where.
            scores: Weights.
            limit: How many.

        Returns:
            Text.
        """

    theirs = get_json_schema(search)["function"]
    ours = describe_function(search).schema
    assert ours.name == theirs["name"]
    assert ours.description == theirs["description"]
    assert ours.parameters == theirs["parameters"]


def test_docstring_without_sections_is_all_description():
    assert parse_docstring("Look.\n\n    Note well: nothing.") == ("Look.\n\nNote well: nothing.", {})


def test_a_missing_hint_is_an_error_where_the_class_is_written():
    with pytest.raises(
        EnvSpecError, match=r"tool Shop\.price: parameter 'item' has no type hint.*'item: str'"
    ):

        class Shop(Env):
            @tool
            def price(self, item) -> int:
                """Price."""


def test_a_missing_docstring_is_an_error():
    with pytest.raises(EnvSpecError, match=r"tool Shop\.price has no docstring"):

        class Shop(Env):
            @tool
            def price(self, item: str) -> int: ...


def test_starred_parameters_are_an_error():
    with pytest.raises(EnvSpecError, match="parameter 'more' is variadic keyword"):

        class Shop(Env):
            @tool
            def price(self, **more: int) -> int:
                """Price."""


def test_an_unknown_name_in_a_hint_is_an_error():
    with pytest.raises(EnvSpecError, match="names 'Nowhere'"):

        class Shop(Env):
            @tool
            def price(self, item: Nowhere) -> int:  # noqa: F821
                """Price."""


def test_a_method_of_every_environment_is_no_tool():
    with pytest.raises(EnvSpecError, match=r"Shop\.step cannot be a tool"):

        class Shop(Env):
            @tool
            def step(self, reply: str) -> str:
                """Step."""


class Base(Env):
    class Kind(Enum):
        A = "a"

    @tool
    def first(self, kind: Kind) -> str:
        """First."""

    @tool(name="renamed")
    def second(self) -> str:
        """Second."""

    @tool
    @staticmethod
    def fixed(n: int) -> int:
        """Fixed."""
        return n


class Derived(Base):
    def second(self, n: int) -> str:
        """Second, derived."""

    @tool
    def third(self) -> str:
        """Third."""

    fixed = None


def test_tools_are_inherited_in_order_and_overridden_under_their_name():
    assert [one.schema.name for one in tools_of(Base)] == ["first", "renamed", "fixed"]
    derived = tools_of(Derived)
    assert [one.schema.name for one in derived] == ["first", "renamed", "third"]
    assert derived[1].schema.description == "Second, derived."
    assert derived[1].schema.parameters["required"] == ["n"]


def test_two_tools_of_one_name_are_an_error():
    with pytest.raises(EnvSpecError, match="Shop has two tools named 'a'"):

        class Shop(Env):
            @tool
            def a(self) -> str:
                """A."""

            @tool(name="a")
            def b(self) -> str:
                """B."""


class Rich(Env):
    @tool
    def draw(self, color: Color, at: Point, path: tuple[Point, ...], order: Order | None = None) -> str:
        """Draw."""


def test_arguments_become_what_the_hints_promise():
    (draw,) = Rich.toolset()
    checked = draw.check(
        {
            "color": "blue",
            "at": {"x": 1},
            "path": [{"x": 2, "y": 3}],
            "order": {"lines": [{"item": "tea", "amount": 2}]},
        }
    )
    assert checked.arguments == {
        "color": Color.BLUE,
        "at": Point(1),
        "path": (Point(2, 3),),
        "order": Order(lines=[Order.Line(item="tea", amount=2)]),
    }


def test_problems_inside_models_are_found():
    (draw,) = Rich.toolset()
    with pytest.raises(
        ValueError, match=r"order\.lines\[0\]\.amount: expected an integer at least 1; found 0"
    ):
        draw.check(
            {"color": "red", "at": {"x": 1}, "path": [], "order": {"lines": [{"item": "t", "amount": 0}]}}
        )


@pytest.mark.parametrize(
    "declared",
    [
        {"name": "go", "description": "Go.", "parameters": {"type": "object", "properties": {}}},
        {"type": "function", "function": {"name": "go", "description": "Go."}},
        {"name": "go", "description": "Go.", "inputSchema": {"properties": {}}},
    ],
)
def test_explicit_schema(declared):
    schema = explicit_schema(declared, "here")
    assert (schema.name, schema.description) == ("go", "Go.")
    assert schema.parameters == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    "declared", ["go", {"description": "x"}, {"name": "go", "parameters": {"type": "array"}}]
)
def test_explicit_schema_that_is_none(declared):
    with pytest.raises(EnvSpecError, match="here: "):
        explicit_schema(declared, "here")


def test_what_is_not_checked_is_said(caplog):
    explicit_schema(
        {"name": "go", "parameters": {"properties": {"a": {"not": {"type": "string"}}}}}, "catalogue"
    )
    assert "catalogue: tool 'go': not checked before calls: not" in caplog.text
