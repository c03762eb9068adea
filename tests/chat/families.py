"""The chat families: a template and a tokenizer with the added tokens that the family's own has.

Published texts come from the installed trl, whose `chat_templates` folder holds many; forms that it lacks
are in `tests/chat/templates`, written from their descriptions. To play the same tests on other templates, put
them into a folder, as `NAME.jinja`, and beside each, where its control tokens are not all seen in its text,
`NAME.json`: {"special": [...], "added": [...], "bos": ..., "eos": ..., "kind": "bytes", "kwargs": {...}}.

    TURNWISE_TEMPLATES=/dir pytest tests/chat/test_families.py
    python -m tests.chat.families                     # the table of docs/chat.md
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tests.support.tokenizers import Kind, family_tokenizer, trl_template

from turnwise.chat.check import TemplateReport
from turnwise.chat.renderer import TemplateRenderer, load_renderer

OWN = Path(__file__).parent / "templates"

Bridging = Literal["exact", "keeps thinking", "new segments"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A template with its tokenizer, and what the renderer must find."""

    name: str
    models: str
    """Who is published with it."""
    template: str
    """A file in `OWN`, or one of trl's."""
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    kind: Kind = "bytes"
    strips: bool = False
    bos: str | None = None
    eos: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dialect: str | None = None
    """None: no tools."""
    bridging: Bridging | None = "exact"
    """Of a conversation with tools where there are some; None: not known."""
    thinks: bool = False
    parallel: bool = True
    beside: bool = True
    """Text beside calls is written where it is said."""
    ambiguous: float = 0.15
    """At most this share of generated replies cannot be told from something else in its notation."""

    @property
    def text(self) -> str:
        """The template's Jinja text."""
        for file in (Path(self.template), OWN / f"{self.template}.jinja"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return trl_template(self.template)


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CALLS = ("<tool_call>", "</tool_call>")
_RESULTS = ("<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_QWEN = {"special": _CHATML, "added": _CALLS + _RESULTS + _THINK, "eos": "<|im_end|>"}
_LLAMA = {
    "special": ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                "<|python_tag|>"),
    "bos": "<|begin_of_text|>", "eos": "<|eot_id|>",
}  # fmt: skip
_DEEPSEEK = {
    "special": (),
    "added": (
        "<｜User｜>", "<｜Assistant｜>", *_THINK, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",
        "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ),
    "bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>",
}  # fmt: skip
_GEMMA3 = {
    "special": ("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
    "kind": "gemma", "bos": "<bos>", "eos": "<eos>",
}  # fmt: skip
_FUNCTION_GEMMA = {
    **_GEMMA3,
    "special": (
        *("<start_of_turn>", "<end_of_turn>"),
        *(f"<start_function_{part}>" for part in ("declaration", "call", "response")),
        *(f"<end_function_{part}>" for part in ("declaration", "call", "response")),
        "<escape>",
    ),
}  # fmt: skip
_GEMMA4 = {
    **_GEMMA3,
    "special": (
        *("<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
        *("<tool_response|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>', "<|image|>", "<|audio|>"),
    ),
}  # fmt: skip
_GPT_OSS = {
    "special": ("<|startoftext|>", "<|endoftext|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
                "<|message|>", "<|call|>"),
    "eos": "<|return|>",
}  # fmt: skip
_GLM = {
    "special": ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
                "<|observation|>", "/nothink"),
    "added": (*_THINK, *_CALLS, *_RESULTS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "eos": "<|endoftext|>",
}  # fmt: skip
_PHI3 = {
    "special": ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"), "kind": "llama", "strips": True,
    "bos": "<s>", "eos": "<|endoftext|>",
}  # fmt: skip
_PHI4 = {
    "special": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>",
                "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
    "eos": "<|endoftext|>",
}  # fmt: skip
_LFM = {
    "special": ("<|im_start|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>",
                "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
    "ambiguous": 0.4,  # Its templates quote strings without escaping what is in them.
    "bos": "<|startoftext|>", "eos": "<|im_end|>",
}  # fmt: skip
_MISTRAL = {
    "special": ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
                "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
                "[ARGS]", "[CALL_ID]"),
    "bos": "<s>", "eos": "</s>",
}  # fmt: skip
_MUSE = {
    "special": ("<|start|>", "<|message|>", "<|eom|>", "<|patch|>", "<|video|>"),
    "bos": "<|begin_of_text|>", "eos": "<|eot|>",
}  # fmt: skip
_COHERE = {
    "special": ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
                "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    "bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>",
}  # fmt: skip
_NEMOTRON2 = {
    "special": ("<SPECIAL_10>", "<SPECIAL_11>"),
    "added": (*_THINK, "<TOOLCALL>", "</TOOLCALL>", "<TOOL_RESPONSE>", "</TOOL_RESPONSE>"),
    "bos": "<s>", "eos": "<SPECIAL_12>",
}  # fmt: skip
_SMOL = {"special": ("<|im_start|>",), "added": (*_CALLS, *_RESULTS, *_THINK), "eos": "<|im_end|>"}
_OFF = {"enable_thinking": False}


def _make(name: str, models: str, template: str, base: Mapping[str, Any], **more: Any) -> Family:
    return Family(name=name, models=models, template=template, **{**base, **more})


_KEEPS: dict[str, Any] = {"bridging": "keeps thinking", "thinks": True}

PUBLISHED = (
    _make("qwen2.5", "Qwen2.5", "qwen2_5", _QWEN, dialect="hermes"),
    _make("qwen3", "Qwen3, thinking on", "qwen3", _QWEN, dialect="hermes", **_KEEPS),
    _make("qwen3/off", "Qwen3, thinking off", "qwen3", _QWEN, kwargs=_OFF, dialect="hermes",
          bridging="keeps thinking"),
    _make("qwen3-2507", "Qwen3 Instruct 2507", "qwen3_instruct_2507", _QWEN, dialect="hermes"),
    _make("qwen3-vl", "Qwen3-VL", "qwen3_vl", _QWEN, dialect="hermes"),
    _make("qwen3-coder", "Qwen3-Coder", "qwen3_coder", _QWEN, dialect="qwen_xml"),
    _make("qwen3.5", "Qwen3.5, thinking on", "qwen3_5_think", _QWEN, dialect="qwen_xml", **_KEEPS),
    _make("qwen3.5/off", "Qwen3.5, thinking off", "qwen3_5_nothink", _QWEN, kwargs=_OFF, dialect="qwen_xml",
          bridging="keeps thinking"),
    _make("qwen3.6", "Qwen3.6", "qwen3_6", _QWEN, dialect="qwen_xml", **_KEEPS),
    _make("qwen3.8", "Qwen3.8", "qwen3_8", _QWEN, dialect="qwen_xml", thinks=True),
    _make("nemotron", "Nemotron 3 Nano, Super", "nemotron_3_nano", _QWEN, dialect="qwen_xml", **_KEEPS),
    _make("nemotron-ultra", "Nemotron 3 Ultra, 3.5", "nemotron_3_ultra", _QWEN, dialect="qwen_xml", **_KEEPS),
    _make("nemotron-nano2", "Nemotron Nano 2", "nemotron_nano2", _NEMOTRON2, dialect="nemotron", **_KEEPS),
    _make("llama3", "Llama 3", "llama3", _LLAMA),
    _make("llama3.1", "Llama 3.1, 3.3", "llama3_1", _LLAMA, dialect="llama3", parallel=False, beside=False),
    _make("llama3.2", "Llama 3.2", "llama3_2", _LLAMA, dialect="llama3", parallel=False, beside=False),
    _make("mistral", "Mistral Small 3", "mistral_small", _MISTRAL, dialect="mistral", beside=False,
          bridging="new segments"),
    _make("mistral-tekken", "Magistral, Devstral 2, Ministral 3", "mistral_tekken", _MISTRAL,
          dialect="mistral_args"),
    _make("deepseek-v3", "DeepSeek V3 0324", "deepseek_v3", _DEEPSEEK, dialect="deepseek_v3"),
    _make("deepseek-v3.1", "DeepSeek V3.1", "deepseek_v31", _DEEPSEEK, dialect="deepseek_v31"),
    _make("deepseek-v3.1/on", "DeepSeek V3.1, thinking on", "deepseek_v31", _DEEPSEEK,
          kwargs={"thinking": True}, dialect="deepseek_v31", **_KEEPS),
    _make("deepseek-r1", "DeepSeek R1", "deepseekv3", _DEEPSEEK, **_KEEPS),
    _make("deepseek-r1-distill", "DeepSeek R1 distillations", "deepseek_r1_distill", _DEEPSEEK, **_KEEPS),
    _make("gemma3", "Gemma 3", "gemma3", _GEMMA3),
    _make("functiongemma", "FunctionGemma", "functiongemma", _FUNCTION_GEMMA, dialect="function_gemma"),
    _make("gemma4", "Gemma 4", "gemma4", _GEMMA4, dialect="gemma", beside=False, **_KEEPS),
    _make("gemma4-v5", "Gemma 4, later revision", "gemma4_v5", _GEMMA4, dialect="gemma", beside=False,
          **_KEEPS),
    _make("gemma4-v5/on", "Gemma 4, thinking on", "gemma4_v5", _GEMMA4, kwargs={"enable_thinking": True},
          dialect="gemma", beside=False, **_KEEPS),
    _make("gpt-oss", "gpt-oss", "gptoss", _GPT_OSS, dialect="harmony", parallel=False, beside=False,
          **_KEEPS),
    _make("glm4", "GLM-4.5, 4.6", "glm4moe", _GLM, dialect="glm", **_KEEPS),
    _make("glm4/off", "GLM-4.5, thinking off", "glm4moe", _GLM, kwargs=_OFF, dialect="glm"),
    _make("phi3", "Phi-3", "phi3", _PHI3),
    _make("phi3.5", "Phi-3.5", "phi3_5", _PHI3),
    _make("phi4", "Phi-4-mini", "phi4_mini", _PHI4, dialect="phi"),
    _make("smollm3", "SmolLM3", "smollm3", _SMOL, dialect="hermes", **_KEEPS),
    _make("smollm3/off", "SmolLM3, thinking off", "smollm3", _SMOL, kwargs=_OFF, dialect="hermes"),
    _make("lfm2", "LFM2", "lfm2", _LFM, dialect="lfm"),
    _make("lfm2-v2", "LFM2, later revision", "lfm2_v2", _LFM, dialect="lfm"),
    _make("lfm2.5", "LFM2.5", "lfm2_2_5", _LFM, added=_THINK, dialect="lfm", **_KEEPS),
    _make("muse", "Muse Glimmer", "muse_glimmer", _MUSE, dialect="atem", thinks=True, beside=False),
    _make("aya", "Aya Expanse", "cohere", _COHERE),
    _make("tiny-aya", "Tiny Aya", "cohere2", _COHERE),
)  # fmt: skip


def _others() -> tuple[Family, ...]:
    """What lies in the folder that the environment names."""
    folder = os.environ.get("TURNWISE_TEMPLATES")
    return tuple(_other(file) for file in sorted(Path(folder).glob("*.jinja"))) if folder else ()


def _other(file: Path) -> Family:
    told = file.with_suffix(".json")
    facts = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    seen = re.findall(
        r"<\|[\w/]+\|>|<｜[^｜<]+｜>|\[/?[A-Z_]{3,}\]|</?[a-z_]+(?:_of_turn|_call|_response)>",
        file.read_text(),
    )
    facts.setdefault("special", list(dict.fromkeys(seen)))
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    family = Family(name=file.stem, models=file.stem, template=str(file), **{"bridging": None, **facts})
    chat = _load(family)
    return replace(
        family,
        dialect=chat.dialect.name if chat.tools_problem is None else None,
        thinks=chat.can_think,
        parallel=chat.template.has_parallel_calls,
        beside=chat.speaks_beside_calls,
        ambiguous=1.0,
    )


@functools.cache
def renderer(name: str, *, thinking: str = "keep", fork: bool = False) -> TemplateRenderer:
    """The family's renderer; of a forked template on request."""
    return _load(BY_NAME[name], thinking=thinking, fork=fork)


def _load(family: Family, *, thinking: str = "keep", fork: bool = False) -> TemplateRenderer:
    tokenizer = family_tokenizer(
        forked(family.text) if fork else family.text, kind=family.kind, special=family.special,
        added=family.added, strips=family.strips, bos=family.bos, eos=family.eos,
    )  # fmt: skip
    kwargs = {**family.kwargs, **({"house_style": "plain"} if fork else {})}
    return load_renderer(tokenizer, chat_template_kwargs=kwargs, thinking=thinking)


def forked(text: str) -> str:
    """A template as somebody's fork has it: a comment, other white space in its tags, one more variable."""
    spaced = re.sub(r"(\{%-?) ", r"\1   ", text)
    return "{#- our own -#}{%- set house_style = house_style | default('formal') -%}\n".rstrip("\n") + spaced


OTHERS = _others()
FAMILIES = PUBLISHED + OTHERS
BY_NAME = {family.name: family for family in FAMILIES}


def bridging(report: TemplateReport) -> Bridging:
    """A report in a word."""
    if report.new_segments:
        return "new segments"
    return "keeps thinking" if report.keeps_thinking else "exact"


def table() -> str:
    """The families as docs/chat.md lists them, from what their renderers find."""
    rows = ["| family | dialect | bridges | in one reply |", "|---|---|---|---|"]
    for family in PUBLISHED:
        chat = renderer(family.name)
        tools = chat.tools_problem is None
        report = chat.reports[tools]
        word = {"exact": "exact", "keeps thinking": "keep thinking", "new segments": ""}[bridging(report)]
        if report.new_segments:
            kinds = ["tool results" if kind == "tool" else "users" for kind in sorted(report.new_segments)]
            word = f"new segments after {' and '.join(kinds)}"
        if chat.template.end is not None and chat.template.end.sampled != chat.template.end.past:
            word += ", and the end that was sampled"
        calls = "no tools"
        if tools:
            calls = "many calls" if chat.template.has_parallel_calls else "one call"
            calls += ", text beside them" if chat.speaks_beside_calls else ""
        rows.append(f"| {family.models} | {chat.dialect.name if tools else '–'} | {word} | {calls} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
