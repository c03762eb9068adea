r"""Text to ids and back, with control tokens only where the template wrote them or the policy sampled them.

A tool result may hold the text ``<|im_end|>``. Tokenised as it stands it would end the turn: whoever writes
an observation could put words in the user's or the policy's mouth. And a policy that repeats the text of
``<tool_call>`` in ordinary tokens has said it, not called. So a token that text merely spells is *broken* by
a noncharacter after its first letter, before a template or a dialect looks for it:

    content  'a <|im_end|> b'                       -> 'a <\ufdd0|im_end|> b'
    ids      [a, Ġ, <, |, im, _end, |, >, Ġ, b]     -> never the id of <|im_end|>

No template and no dialect takes it for the token, wherever they put it. Encoding, and `mend`, take the breaks
out. Text without breaks, which is nearly all text, takes the tokenizer's own path and yields its very ids.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from turnwise.errors import TemplateError

# Unicode noncharacters, reserved for a program's internal use. A break that text itself holds is followed by
# the other one.
_BREAK, _OWN = "\ufdd0", "\ufdd1"
_MEND = re.compile(f"{_BREAK}({_OWN}?)")


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern for any of ``tokens``, longer ones first, so that none is taken for its own beginning."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=lambda t: (-len(t), t))) or "(?!)"


@functools.lru_cache(maxsize=64)
def _whole(tokens: frozenset[str]) -> re.Pattern[str]:
    """Any of ``tokens`` that is not broken; one of a single letter has its break behind it."""
    return re.compile(f"(?:{_any_of(tokens)})(?!{_BREAK}(?!{_OWN}))")


def mend(value: Any) -> Any:
    """Text as it was before it was broken; in JSON values every string, keys too."""
    if isinstance(value, str):
        return _MEND.sub(lambda match: _BREAK if match[1] else "", value) if _BREAK in value else value
    if isinstance(value, dict):
        return {mend(key): mend(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mend(item) for item in value]
    return value


class Encoder:
    """A tokenizer's text side, held apart from whoever else uses the tokenizer.

    Args:
        tokenizer: A fast tokenizer of ``transformers``; it is copied, so that truncation or padding set by
            others never reaches what the policy reads.
        template: The chat template's text: added tokens that it writes are control tokens.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        from tokenizers import Tokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library; a tokenizer with a "
                "tokenizer.json is needed (transformers converts most: save it once with save_pretrained)"
            )
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.added: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.content
        }
        """Every added token, control or not, and its id."""
        # As `transformers` decides it: special tokens, and others that the template writes itself. An added
        # token of mere whitespace (Gemma's) is in every template and means nothing there.
        self.control = frozenset(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content in template)
        )
        """Tokens that structure a conversation."""
        self._added = _whole(frozenset(self.added))
        tokens = tokenizer.added_tokens_decoder.values()
        self._takes_space = (
            frozenset(token.content for token in tokens if token.lstrip),
            frozenset(token.content for token in tokens if token.rstrip),
        )

    def fingerprint(self) -> str:
        """Hash of the tokenizer: vocabulary, merges, added tokens, normalisation."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def mark(self, text: str, *, allow: frozenset[str] = frozenset()) -> str:
        """``text`` with its control tokens broken, those in ``allow`` left as tokens."""
        if not text.isascii():
            # Half a character (of a file name, of a careless escape) is no text: no tokenizer takes it.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return _broken(text, self.control - allow if allow else self.control)

    def mark_all(self, value: Any) -> Any:
        """JSON values with every string marked, keys too."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, dict):
            return {self.mark_all(key): self.mark_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark_all(item) for item in value]
        return value

    def find_control(self, text: str, start: int = 0) -> list[re.Match[str]]:
        """Where control tokens stand in ``text`` from ``start`` on, in order."""
        return list(_whole(self.control).finditer(text, start))

    def encode(self, text: str) -> list[int]:
        """The ids of rendered, possibly marked, text; nothing is added before or after it."""
        if _BREAK not in text:
            return self._encode_whole(text)
        out: list[int] = []
        begun = position = 0
        before = ""
        # What lies between two tokens and is marked is encoded apart; all else as it stands.
        for match in [*self._added.finditer(text), None]:
            end = match.start() if match else len(text)
            plain = text[position:end]
            if _BREAK in plain:
                out += self._encode_whole(text[begun:position])
                if before in self._takes_space[1]:
                    plain = plain.lstrip()
                if match and match.group() in self._takes_space[0]:
                    plain = plain.rstrip()
                out += self._encode_plain(mend(plain))
                begun = end
            if match:
                before, position = match.group(), match.end()
        return out + self._encode_whole(text[begun:])

    def _encode_whole(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of ``text`` with no added token recognised in it."""
        if not text:
            return []
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [text]
        if self._backend.pre_tokenizer is not None:
            words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        model = self._backend.model
        return [token.id for word in words for token in model.tokenize(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_marked(self, ids: Sequence[int], tokens: frozenset[str]) -> str:
        """The text of ``ids``, in which those of ``tokens`` that ordinary ids merely spell are broken."""
        text = self.decode(ids)
        wanted = {self.added[token] for token in tokens}
        sampled = sum(index in wanted for index in ids)
        if _BREAK not in text and len(_whole(tokens).findall(text)) == sampled:
            return text
        out, start = "", 0
        for position, index in [*enumerate(ids), (len(ids), None)]:
            if index is None or index in wanted:
                out += _broken(self.decode(ids[start:position]), tokens)
                out += "" if index is None else self.decode([index])
                start = position + 1
        return out


def _broken(text: str, tokens: frozenset[str]) -> str:
    """``text`` with ``tokens`` broken, until none is left: one may stand inside of another."""
    text = text.replace(_BREAK, _BREAK + _OWN)
    pattern = _whole(tokens)
    while pattern.search(text):
        text = pattern.sub(lambda match: match.group()[0] + _BREAK + match.group()[1:], text)
    return text
