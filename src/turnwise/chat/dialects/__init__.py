"""Dialects: how a family of models writes tool calls. Found from what the template writes, not from its text.

A call is rendered with the template and handed to each dialect; the one that reads the call back is the one.
So a forked template (other white space, a comment, an extra variable) needs no entry anywhere. A new family
is one small class with `Dialect`'s methods, added to `DIALECTS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from turnwise.chat.dialects.atem import AtemDialect
from turnwise.chat.dialects.base import Dialect, PlainDialect
from turnwise.chat.dialects.cohere import CohereDialect
from turnwise.chat.dialects.deepseek import DEEPSEEK_DSML, DEEPSEEK_V3, DEEPSEEK_V31
from turnwise.chat.dialects.gemma import FUNCTION_GEMMA, GEMMA
from turnwise.chat.dialects.glm import GlmDialect
from turnwise.chat.dialects.harmony import HarmonyDialect
from turnwise.chat.dialects.hermes import HermesDialect
from turnwise.chat.dialects.invoke import MiniMaxDialect
from turnwise.chat.dialects.llama3 import Llama3Dialect
from turnwise.chat.dialects.mistral import MISTRAL, MISTRAL_ARGS
from turnwise.chat.dialects.nemotron import NemotronDialect
from turnwise.chat.dialects.phi import PhiDialect
from turnwise.chat.dialects.pythonic import LFM, PYTHONIC
from turnwise.chat.dialects.qwen_xml import QwenXmlDialect
from turnwise.chat.dialects.response_template import ResponseTemplateDialect
from turnwise.types import ToolCall, ToolSchema

__all__ = ["DIALECTS", "Dialect", "PlainDialect", "ResponseTemplateDialect", "find_dialect"]

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        HermesDialect(),
        QwenXmlDialect(),
        GlmDialect(),
        Llama3Dialect(),
        MISTRAL,
        MISTRAL_ARGS,
        DEEPSEEK_V3,
        DEEPSEEK_V31,
        DEEPSEEK_DSML,
        GEMMA,
        FUNCTION_GEMMA,
        LFM,
        PhiDialect(),
        NemotronDialect(),
        CohereDialect(),
        HarmonyDialect(),
        AtemDialect(),
        MiniMaxDialect(),
        PYTHONIC,
    )
}
"""By name, in the order in which they are tried."""


def find_dialect(
    written: str,
    calls: tuple[ToolCall, ...],
    *,
    thinking: bool,
    tools: Sequence[ToolSchema] = (),
    more: tuple[Dialect, ...] = (),
) -> Dialect | None:
    """The first dialect that reads ``calls`` back from what the template wrote; None where none does."""
    wanted = [(call.name, dict(call.arguments)) for call in calls]
    for dialect in (*DIALECTS.values(), *more):
        read = dialect.parse(written, thinking=thinking, tools=tools).tool_calls
        if [(call.name, dict(call.arguments)) for call in read if call.error is None] == wanted:
            return dialect
    return None
