"""Tokenizers for tests: byte-level BPE fitted in milliseconds, with Qwen's special tokens and a template."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Qwen3's added tokens; as there, the last six are added tokens that `skip_special_tokens` keeps."""

CHATML_TOOLS = r"""
{%- for message in messages %}
    {%- if loop.first and tools %}
        {{- '<|im_start|>system\n' }}
        {%- if message.role == 'system' %}
            {{- message.content + '\n\n' }}
        {%- endif %}
        {{- '# Tools\n<tools>' }}
        {%- for tool in tools %}
            {{- '\n' + tool | tojson }}
        {%- endfor %}
        {{- '\n</tools><|im_end|>\n' }}
    {%- elif message.role == 'system' %}
        {{- '<|im_start|>system\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{ '\n' }}{% endif %}
            {%- set body = {'name': call.function.name, 'arguments': call.function.arguments} %}
            {{- '<tool_call>\n' + body | tojson + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
"""ChatML with Hermes tool calls: append-only, rendered as Qwen2.5 does but shorter."""

_CORPUS = (
    "<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n",
    '{"type": "function", "function": {"name": "move", "description": "Move.", "parameters": '
    '{"type": "object", "properties": {"direction": {"type": "string"}}, "required": ["direction"]}}}',
    '<tool_call>\n{"name": "move", "arguments": {"direction": "left"}}\n</tool_call>',
    "<|im_start|>user\n<tool_response>\nThe ball is at column 2.\n</tool_response><|im_end|>\n",
    "<|im_start|>assistant\n<think>\n\n</think>\n\nThe answer is 42.<|im_end|>\n",
)


def trl_template(name: str) -> str:
    """The Jinja text of a published model's template, as the installed trl ships it: ``llama3_1``."""
    trl = importlib.util.find_spec("trl")
    assert trl is not None and trl.origin is not None
    return (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tiny_tokenizer(
    chat_template: str | None = CHATML_TOOLS,
    *,
    texts: Sequence[str] = (),
    vocab_size: int = 512,
    specials: Sequence[str] = (),
    bos: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens: any text round-trips, nothing is downloaded.

    Args:
        chat_template: Jinja text; None leaves the tokenizer without a template.
        texts: Fitted on besides a small corpus of chat boilerplate.
        vocab_size: At most, ``specials`` apart; 256 bytes and Qwen's special tokens are always in it.
        specials: More special tokens, for the templates of other families.
        bos: The token that begins a text, where the template asks for one; a special token too.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Qwen2's own splitting: it decides which merges may cross newlines and spaces.
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(QWEN_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_CORPUS, *texts], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in QWEN_SPECIALS[:3]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN_SPECIALS[3:]])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=bos,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


Kind = Literal["bytes", "gemma", "llama"]


def family_tokenizer(
    chat_template: str,
    *,
    kind: Kind = "bytes",
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    strips: bool = False,
    bos: str | None = None,
    eos: str | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's own added tokens and nothing of Qwen's.

    Args:
        chat_template: Jinja text.
        kind: ``bytes`` (byte-level BPE: Qwen, Llama 3, DeepSeek, GPT), ``gemma`` (spaces as a letter, bytes
            as a fallback, line breaks as added tokens), ``llama`` (a space before each text: Llama 2, Phi-3).
        special: Added tokens that `skip_special_tokens` leaves out.
        added: Added tokens that it keeps.
        strips: Special tokens take the white space after them, as Phi-3's do.
        bos: Begins a text; a special token too.
        eos: Ends a text; a special token too.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_fitted(kind))
    ends = [token for token in (bos, eos) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ends])
    rest = [token for token in special if token not in ends]
    tokenizer.add_special_tokens([AddedToken(token, special=True, rstrip=strips) for token in rest])
    breaks = ("\n\n", "\n") if kind == "gemma" else ()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (*added, *breaks)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat_template
    return fast


@functools.cache
def _fitted(kind: Kind) -> str:
    """A tokenizer without added tokens, as JSON; fitted once."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if kind == "bytes":
        made = tiny_tokenizer().backend_tokenizer.to_str()
        body: dict[str, Any] = json.loads(made)
        body["added_tokens"] = []
        names = {token for token in QWEN_SPECIALS if token in body["model"]["vocab"]}
        assert not names, "added tokens must not be in the model"
        return json.dumps(body)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    # As there, no piece has a line break among other letters.
    texts = [line.replace(" ", "▁") for text in _CORPUS for line in text.splitlines()]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    fitted = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *fitted["vocab"]]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in fitted["merges"]]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    body = json.loads(Tokenizer(model).to_str())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    body["normalizer"], body["decoder"] = spaces, [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if kind == "llama":
        body["normalizer"] = {
            "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]
        }  # fmt: skip
        body["decoder"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    body["decoder"] = {"type": "Sequence", "decoders": body["decoder"]}
    return json.dumps(body)
