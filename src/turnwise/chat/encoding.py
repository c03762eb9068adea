r"""Text to ids and back, with control tokens only where the template wrote them.

A tool result may hold the text ``<|im_end|>``. Tokenised as it stands it would end the turn: whoever writes
an observation could put words in the user's or the policy's mouth. So control tokens that come from messages
are *marked* before the template sees them, and what is marked is encoded as ordinary text:

    content  'a <|im_end|> b'                       -> marked '…a \ufdd0<|im_end|>\ufdd1 b…'
    ids      [a, Ġ, <, |, im, _end, |, >, Ġ, b]     -> never the id of <|im_end|>

Text without marks, which is nearly all text, takes the tokenizer's own path and yields its very ids.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from turnwise.errors import TemplateError

# Unicode noncharacters, reserved for a program's internal use. Text that holds them has them marked too.
_START, _END = "\ufdd0", "\ufdd1"


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern for any of ``tokens``, longer ones first, so that none is taken for its own beginning."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=lambda t: (-len(t), t))) or "(?!)"


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
        self._to_mark = re.compile(f"{_any_of(self.control)}|[{_START}{_END}]")
        added = _any_of(self.added)
        self._added_pattern = re.compile(added)
        self._pieces = re.compile(
            f"{_START}(?P<marked>{added}|[{_START}{_END}]){_END}|(?P<token>{added})|[{_START}{_END}]"
        )

    def fingerprint(self) -> str:
        """Hash of the tokenizer: vocabulary, merges, added tokens, normalisation."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def mark(self, text: str, *, allow: frozenset[str] = frozenset()) -> str:
        """``text`` with its control tokens marked as ordinary text, those in ``allow`` left as tokens."""
        if not text.isascii():
            # Half a character (of a file name, of a careless escape) is no text: no tokenizer takes it.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if not self._to_mark.search(text):
            return text

        def wrap(match: re.Match[str]) -> str:
            token = match.group()
            return token if token in allow else f"{_START}{token}{_END}"

        return self._to_mark.sub(wrap, text)

    def mark_all(self, value: Any) -> Any:
        """JSON values with every string marked, keys too."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, dict):
            return {self.mark_all(key): self.mark_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark_all(item) for item in value]
        return value

    def find_added(self, text: str, start: int = 0) -> list[re.Match[str]]:
        """Where added tokens stand in ``text`` from ``start`` on, in order."""
        return list(self._added_pattern.finditer(text, start))

    def encode(self, text: str) -> list[int]:
        """The ids of rendered, possibly marked, text; nothing is added before or after it."""
        if _START not in text and _END not in text:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        out: list[int] = []
        plain, position = "", 0
        for match in self._pieces.finditer(text):
            plain += text[position : match.start()] + (match["marked"] or "")
            position = match.end()
            if match["token"]:
                out += self._encode_plain(plain)
                out.append(self.added[match["token"]])
                plain = ""
        return out + self._encode_plain(plain + text[position:])

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
