"""`Reader`: from an OpenEnv observation, an environment's own JSON object, to what a policy sees.

Where one field holds something, it is what is shown: text as it is, images as images, other values as JSON.
Where several do, all are, as a JSON object. ``show`` names those that are wanted, ``cumulative`` says that
each observation repeats the ones before it.

    {"echoed_message": "hi"}                                    hi
    {"board": "x..", "legal_actions": [1, 2]}                   {"board":"x..","legal_actions":[1,2]}
    the same with show=["board"]                                x..
    {"tool_name": "add", "result": {"data": 5, …}}              5
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise import images
from turnwise.envs import observe
from turnwise.errors import EnvError, ImageError
from turnwise.openenv.client.differences import Differences
from turnwise.types import Content, ImageBlock, TextBlock

PNG = "iVBORw0KGgo"
"""How the base64 of every PNG file begins."""


class Reader:
    """Reads the observations of one session.

    Args:
        show: Names of the fields to show, in this order; found as above if empty.
        cumulative: Show what each observation adds to the one before.
        what: For errors.
    """

    def __init__(self, show: Sequence[str], *, cumulative: bool, what: str) -> None:
        self._show, self._cumulative, self._what = tuple(show), cumulative, what
        self._differences = Differences()

    @property
    def chooses(self) -> bool:
        """Whether it was said which fields are shown."""
        return bool(self._show)

    def begin(self) -> None:
        """Forget the last episode."""
        self._differences = Differences()

    def read(self, observation: Any, limit: int | None) -> Content:
        """What is shown of ``observation``, at most ``limit`` characters of it.

        Raises:
            EnvError: It is no JSON object, lacks a field of ``show``, or holds a broken image.
        """
        if not isinstance(observation, Mapping):
            raise EnvError(f"{self._what}: the observation is no JSON object: {observation!r:.80}")
        if self._show:
            fields = {name: self._field(observation, name) for name in self._show}
        else:
            fields = {name: value for name, value in observation.items() if value is not None}
        if self._cumulative:
            fields = {name: self._differences.fresh(name, value) for name, value in fields.items()}
        if not self._show:
            fields = {name: value for name, value in fields.items() if value not in ("", [], {})}
        try:
            return _content(fields, limit, joined=bool(self._show))
        except (observe.BadResultError, ImageError) as cause:
            raise EnvError(f"{self._what}: the observation holds {cause}") from cause

    def _field(self, observation: Mapping[str, Any], name: str) -> Any:
        if name in observation:
            return observation[name]
        raise EnvError(
            f"{self._what}: the observation has no field '{name}', which args.show names; it has "
            f"{', '.join(observation) or 'none'}"
        )


def tool_result(value: Any, limit: int | None) -> Content:
    """What a policy sees of a tool's result: FastMCP's own form opened, or a JSON value.

    Raises:
        observe.BadResultError: It holds a broken image.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), list):
        return _content({"": value}, limit, joined=False)
    blocks = [_block(one) for one in value["content"]]
    if any(isinstance(one, ImageBlock) for one in blocks):
        return observe.observation(blocks, limit)
    data = value.get("data")
    if data is not None and not isinstance(data, str):
        return observe.observation(data, limit)
    return observe.cut("\n".join(one.text for one in blocks if isinstance(one, TextBlock)), limit)


def _content(fields: Mapping[str, Any], limit: int | None, *, joined: bool) -> Content:
    """Fields as text or blocks: side by side as they are where they are ``joined``, else as one object."""
    pictures: list[ImageBlock] = []
    rest: dict[str, Any] = {}
    for name, value in fields.items():
        found = _pictures(value)
        pictures += found
        if not found:
            rest[name] = value
    if len(rest) == 1 or joined:
        text = "\n".join(filter(None, map(_text, rest.values())))
    else:
        text = _text(rest) if rest else ""
    if pictures:
        return observe.observation([*pictures, *([TextBlock(text=text)] if text else [])], limit)
    return observe.cut(text, limit)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_said(one) is not None for one in value):
        return "\n".join(str(_said(one)) for one in value)
    told = observe.observation(value, None)
    assert isinstance(told, str)
    return told


def _said(entry: Any) -> str | None:
    """The text of one message among a list of them, as games of several players keep them."""
    said = entry.get("content") if isinstance(entry, Mapping) else None
    return said if isinstance(said, str) else None


def _pictures(value: Any) -> list[ImageBlock]:
    """The images that a field holds: a PNG in base64, a data URL, or a list of such."""
    if isinstance(value, list) and value and all(isinstance(one, str) and _encoded(one) for one in value):
        return [picture for one in value for picture in _pictures(one)]
    encoded = _encoded(value) if isinstance(value, str) else None
    if encoded is None:
        return []
    try:
        return [images.put(base64.b64decode(encoded, validate=True))]
    except ValueError:
        raise observe.BadResultError("an image whose base64 is broken") from None


def _encoded(value: str) -> str | None:
    if value.startswith(PNG):
        return value
    return value.partition(";base64,")[2] or None if value.startswith("data:image/") else None


def _block(block: Any) -> TextBlock | ImageBlock:
    """A block of MCP content."""
    if isinstance(block, Mapping) and block.get("type") == "image":
        [picture] = _pictures(f"data:{block.get('mimeType', 'image/png')};base64,{block.get('data')}")
        return picture
    if isinstance(block, Mapping) and isinstance(block.get("text"), str):
        return TextBlock(text=block["text"])
    return TextBlock(text=_text(block))
