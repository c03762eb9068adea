"""Trajectories as lines of JSON: `encode` and `decode`, exact in both directions.

    {"schema":1,"id":"rl/12/catch/3/s5","group_id":…,"segments":[{"prompt":[…],"turns":[…]}],…}

A line is read by the types of `turnwise.types`: tuples, enums and blocks come back as they were, floats
bit by bit. Unknown fields and newer schemas are errors, never guessed at. In free JSON (a task, a call's
arguments, a step's info) what JSON lacks is written as its nearest kin: NaN as null, a tuple as a list.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any, Literal, Union

import numpy as np
import orjson

from turnwise.errors import StoreError
from turnwise.types import Trajectory

SCHEMA = 1
"""Of the lines written here; raised whenever an older reader would misread them."""

_ID = re.compile(rb'\{"schema":1,(?:"wide":true,)?"id":("(?:[^"\\]|\\.)*")')

Read = Callable[[Any], Any]


def encode(trajectory: Trajectory) -> bytes:
    """One line, its newline included.

    Raises:
        StoreError: A reward, logprob or metric is not finite, or a value is none that JSON knows.
    """
    for name, value in _floats(trajectory):
        if not math.isfinite(value):
            raise StoreError(f"trajectory {trajectory.id}: {name} is {value}; only finite numbers are stored")
    try:
        body = orjson.dumps(trajectory, default=_plain_leaf)
        head = b'{"schema":%d,' % SCHEMA
    except TypeError as cause:
        # A model can write what orjson cannot: integers past 64 bits, lone surrogates, deep nesting.
        try:
            body = json.dumps(_plain(trajectory), separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise StoreError(f"trajectory {trajectory.id} holds what is not JSON: {cause}") from cause
        head = b'{"schema":%d,"wide":true,' % SCHEMA
    return head + body[1:] + b"\n"


def decode(line: bytes) -> Trajectory:
    """The trajectory of a line.

    Raises:
        StoreError: It is not JSON, of a newer schema, or not what `encode` writes.
    """
    return from_record(parse(line))


def from_record(record: dict[str, Any]) -> Trajectory:
    """The trajectory of what `parse` made of a line.

    Raises:
        StoreError: It is not what `encode` writes.
    """
    trajectory: Trajectory = _reader(Trajectory)({k: v for k, v in record.items() if k != "wide"})
    return trajectory


def decode_id(line: bytes) -> str:
    """The id of a line's trajectory, without reading the rest where `encode` wrote the line."""
    found = _ID.match(line)
    if found is None:
        value = parse(line).get("id")
    else:
        try:
            value = orjson.loads(found[1])
        except orjson.JSONDecodeError:
            value = json.loads(found[1])
    if not isinstance(value, str):
        raise StoreError(f"a trajectory's id must be text, found {value!r}")
    return value


def parse(line: bytes) -> dict[str, Any]:
    """A record of any kind: a JSON object of a known schema, its ``schema`` taken out.

    Raises:
        StoreError: It is no JSON object, or of a newer schema.
    """
    try:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = json.loads(line)
        else:
            if isinstance(record, dict) and record.get("wide"):
                record = json.loads(line)  # orjson would read a wide integer as a float
    except ValueError as cause:
        raise StoreError(f"not JSON ({cause}): {line[:60]!r}") from cause
    if not isinstance(record, dict):
        raise StoreError(f"a record must be a JSON object, found {line[:60]!r}")
    schema = record.pop("schema", None)
    if not isinstance(schema, int):
        raise StoreError(f'a record must name its schema ("schema": {SCHEMA}), found {schema!r}')
    if schema > SCHEMA:
        raise StoreError(
            f"schema {schema} was written by a newer Turnwise; this one reads up to {SCHEMA}: "
            "upgrade it to read the file"
        )
    return record


# ---------------------------------------------------------------------------------------------------
# Writing


def _floats(trajectory: Trajectory) -> Iterator[tuple[str, float]]:
    """Every number that training relies on, with its name; a row as its sum, which is finite iff it is."""
    yield "started", trajectory.started
    yield "seconds", trajectory.seconds
    for name, reward in trajectory.rewards.items():
        yield f"rewards.{name}.weight", reward.weight
        if reward.value is not None:
            yield f"rewards.{name}.value", reward.value
    for name, value in trajectory.metrics.items():
        yield f"metrics.{name}", value
    for number, turn in enumerate(trajectory.turns):
        where = f"turn {number}: "
        yield where + "logprobs", sum(turn.logprobs or ())
        yield where + "kept_mass", sum(turn.kept_mass or ())
        yield where + "seconds", turn.policy_seconds + turn.env_seconds
        yield where + "reward", turn.reward or 0.0
        for result in turn.tool_results:
            if result.step is not None:
                yield where + f"reward of {result.call.name}", result.step.reward or 0.0


def _plain_leaf(value: object) -> object:
    """What orjson asks about: read-only mappings, and numbers and arrays of numpy by their exact values."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _plain(value: Any) -> Any:
    """``value`` in the types of the standard json module, which writes what orjson refuses."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | int) or value is None:
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys must be text")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(_plain_leaf(value))


# ---------------------------------------------------------------------------------------------------
# Reading: each annotation becomes a function from JSON to the value, made once


@cache
def _reader(hint: Any) -> Read:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(typing.cast(type, hint))
    if origin in (Union, types.UnionType):
        return _union_reader(args)
    if origin is Literal:
        return _choice_reader(args)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum_reader(hint)
    if origin is tuple:
        return _sequence_reader(tuple, args[0])
    if origin is list:
        return _sequence_reader(list, args[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping_reader(args[1])
    if hint is Any:
        return lambda value: value
    return _scalar_reader(hint)


def _dataclass_reader(cls: type) -> Read:
    hints = typing.get_type_hints(cls)
    required, known = _field_names(cls)
    readers = {name: _reader(hints[name]) for name in known}

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise StoreError(f"{cls.__name__}: expected an object, found {value!r:.60}")
        if unknown := value.keys() - readers.keys():
            raise StoreError(
                f"{cls.__name__}: unknown field {min(unknown)!r}; known are {', '.join(readers)}"
            )
        if missing := required - value.keys():
            raise StoreError(f"{cls.__name__}: field {min(missing)!r} is missing")
        return cls(**{name: readers[name](item) for name, item in value.items()})

    return read


def _field_names(cls: type) -> tuple[frozenset[str], tuple[str, ...]]:
    """The fields without a default, and all of them. One with a default may be missing: it came later."""
    fields = dataclasses.fields(cls)
    none = dataclasses.MISSING
    required = (field.name for field in fields if field.default is none and field.default_factory is none)
    return frozenset(required), tuple(field.name for field in fields)


def _union_reader(members: tuple[Any, ...]) -> Read:
    """By the shape of the value: no union of ours holds two members of one shape."""
    readers = [(_recognises(member), _reader(member)) for member in members if member is not type(None)]
    names = ", ".join(getattr(member, "__name__", str(member)) for member in members)
    optional = type(None) in members

    def read(value: Any) -> Any:
        if value is None and optional:
            return None
        for recognises, reader in readers:
            if recognises(value):
                return reader(value)
        raise StoreError(f"expected one of {names}; found {value!r:.60}")

    return read


def _recognises(hint: Any) -> Callable[[Any], bool]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        required, known = _field_names(typing.cast(type, hint))
        return lambda value: isinstance(value, dict) and required <= value.keys() <= set(known)
    if origin in (tuple, list):
        inner = _recognises(args[0])
        return lambda value: isinstance(value, list) and all(inner(item) for item in value)
    if origin in (Union, types.UnionType):
        inners = [_recognises(member) for member in args]
        return lambda value: any(inner(value) for inner in inners)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return lambda value: isinstance(value, dict)
    if origin is Literal:
        return lambda value: value in args
    if hint is float:
        return lambda value: isinstance(value, float | int)
    return lambda value: isinstance(value, hint)


def _sequence_reader(container: type[tuple[Any, ...]] | type[list[Any]], item: Any) -> Read:
    # Rows of token ids and logprobs are long; they are taken as they are.
    plain = item in (int, float, str)
    reader = _reader(item)

    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise StoreError(f"expected a list, found {value!r:.60}")
        return container(value) if plain else container(map(reader, value))

    return read


def _mapping_reader(item: Any) -> Read:
    reader = _reader(item)

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise StoreError(f"expected an object, found {value!r:.60}")
        return value if item is Any else {key: reader(entry) for key, entry in value.items()}

    return read


def _choice_reader(choices: tuple[Any, ...]) -> Read:
    def read(value: Any) -> Any:
        if value not in choices:
            raise StoreError(f"expected one of {', '.join(map(repr, choices))}; found {value!r}")
        return value

    return read


def _enum_reader(cls: type[Enum]) -> Read:
    def read(value: Any) -> Any:
        try:
            return cls(value)
        except ValueError as cause:
            raise StoreError(f"{cls.__name__}: expected one of {', '.join(cls)}; found {value!r}") from cause

    return read


def _scalar_reader(cls: type) -> Read:
    accepted: tuple[type, ...] = (float, int) if cls is float else (cls,)

    def read(value: Any) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and cls is not bool):
            raise StoreError(f"expected {cls.__name__}, found {value!r:.60}")
        return value

    return read
