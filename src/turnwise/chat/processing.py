"""`Processing`: a model's tokenizer and, for a vision-language model, its image processor.

Both are what a processor of ``transformers`` holds. Processors of Qwen's vision models also hold one for
videos, which cannot be made without torchvision; a model's name or directory is therefore read part by part.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from turnwise.chat.vision import Vision
from turnwise.errors import ImageError, TemplateError, boundary

log = logging.getLogger(__name__)

_PLACEHOLDER = "<|image_pad|>"
"""Of Qwen's families, whose tokenizers do not all name it."""
_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Of a processor, kept as they are for whoever loads the whole of it."""


@dataclass(slots=True, kw_only=True)
class Processing:
    """What stands between messages and a model's inputs."""

    tokenizer: Any
    vision: Vision | None = None
    """None where only text is read."""
    chat_template: str | None = None
    """The processor's own; None leaves it to the tokenizer."""
    parts: tuple[Any, ...] = ()
    """What is saved beside the model: the processor, or the tokenizer and the image processor."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the processor that no part writes."""

    @classmethod
    def of(cls, given: Any, revision: str | None = None) -> Self:
        """Of a tokenizer, a processor, or the name or directory of a model.

        An image processor that cannot be had, or is of a kind that is not known here, is left out with a
        warning: text is read all the same.

        Raises:
            TemplateError: The tokenizer cannot be loaded.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str | Path):
            return cls._load(str(given), revision)
        tokenizer = getattr(given, "tokenizer", None)
        if tokenizer is None:
            return cls(tokenizer=given, parts=(given,))
        template = getattr(given, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        image_processor = getattr(given, "image_processor", None)
        token = getattr(given, "image_token", None)
        return cls(
            tokenizer=tokenizer,
            vision=None if image_processor is None else _vision(image_processor, tokenizer, token),
            chat_template=template,
            parts=(given,),
        )

    @classmethod
    def _load(cls, name: str, revision: str | None) -> Self:
        from transformers import AutoImageProcessor, AutoTokenizer
        from transformers.utils import cached_file

        with boundary(TemplateError, f"the tokenizer of {name} cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        if not sees(name, revision):
            return cls(tokenizer=tokenizer, parts=(tokenizer,))
        try:
            with boundary(ImageError, f"the image processor of {name} cannot be loaded"):
                image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        except ImageError as cause:
            log.warning("images cannot be read: %s", cause)
            return cls(tokenizer=tokenizer, parts=(tokenizer,))
        found = {
            file: cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            for file in _FILES
        }
        return cls(
            tokenizer=tokenizer,
            vision=_vision(image_processor, tokenizer, None),
            parts=(tokenizer, image_processor),
            files={file: Path(path).read_bytes() for file, path in found.items() if path is not None},
        )

    def set_template(self, source: str) -> None:
        """Save this chat template with the rest."""
        self.tokenizer.chat_template = source
        for part in self.parts:
            if hasattr(part, "chat_template"):
                part.chat_template = source

    def save_pretrained(self, directory: str | Path) -> None:
        """Write everything beside a model, as ``transformers`` reads it."""
        for part in self.parts:
            part.save_pretrained(directory)
        for file, content in self.files.items():
            if not (path := Path(directory, file)).exists():
                path.write_bytes(content)


def sees(name: str, revision: str | None = None) -> bool:
    """Whether a model's configuration names a vision tower; a tokenizer's directory may have none."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except OSError:
        return False
    return "vision_config" in config


def _vision(image_processor: Any, tokenizer: Any, token: str | None) -> Vision | None:
    token = token or getattr(tokenizer, "image_token", None) or _PLACEHOLDER
    token_id = tokenizer.convert_tokens_to_ids(token)
    try:
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ImageError(f"the tokenizer has no placeholder {token!r} for them")
        return Vision(image_processor, token, int(token_id))
    except ImageError as cause:
        log.warning("images cannot be read: %s", cause)
        return None
