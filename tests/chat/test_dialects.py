"""Dialects side by side: each is known by its own calls, and takes no other's."""

from __future__ import annotations

import pytest
from tests.support.calls import TOOL

from turnwise.chat.dialects import DIALECTS, find_dialect
from turnwise.types import ToolCall

CALL = ToolCall(name="run", arguments={"text": "left", "count": 3}, id="call_0")


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_found_by_its_own_calls(name: str) -> None:
    written = DIALECTS[name].format(CALL)
    assert find_dialect(written, (CALL,), thinking=False, tools=[TOOL]) is DIALECTS[name]
    for other in DIALECTS.values():
        if other.name != name:
            assert all(call.error for call in other.parse(written, tools=[TOOL]).tool_calls)
