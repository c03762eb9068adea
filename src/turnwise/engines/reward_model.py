"""`RewardModel`: a sequence classifier with one logit, whose logit is the reward.

    model = RewardModel("org/reward-model")
    model.score(["plain text", [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]])

Conversations are rendered by the model's own chat template and not given special tokens a second time, as
TRL's ``GRPOTrainer`` does it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from turnwise.errors import EnvLostError, boundary

ROWS = 16
"""Texts in one forward pass."""


class RewardModel:
    """Loaded when it is first asked. May be asked from several threads; they wait for each other.

    Args:
        model: Its Hub name or directory, or the model.
        tokenizer: The model's own if None.
        model_kwargs: For ``AutoModelForSequenceClassification.from_pretrained``, where a name is given.
        template_kwargs: For the chat template.
        device: A GPU where there is one if None; a model that is given stays where it is.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        *,
        tokenizer: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        self._given, self._tokenizer, self._device = model, tokenizer, device
        self._model_kwargs, self._template_kwargs = dict(model_kwargs or {}), dict(template_kwargs or {})
        self._model: Any = None
        self._lock = threading.Lock()

    def score(self, texts: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[float]:
        """The logit of each text or conversation, in order.

        Raises:
            EnvLostError: The model or its tokenizer cannot be loaded, which no completion is to blame for.
        """
        with self._lock, torch.inference_mode():
            if self._model is None:
                with boundary(EnvLostError, f"reward model {self.name}"):
                    self._load()
            rendered = [text if isinstance(text, str) else self._rendered(text) for text in texts]
            scores: list[float] = []
            for start in range(0, len(rendered), ROWS):
                rows = self._tokenizer(
                    text=rendered[start : start + ROWS],
                    return_tensors="pt",
                    padding=True,
                    padding_side="right",
                    add_special_tokens=False,
                ).to(next(self._model.parameters()).device)
                scores += self._model(**rows).logits[:, 0].float().tolist()
        return scores

    @property
    def name(self) -> str:
        """The model's Hub name or directory."""
        if isinstance(self._given, str):
            return self._given
        config: Any = self._given.config
        return str(config._name_or_path)

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return str(
            self._tokenizer.apply_chat_template(list(messages), tokenize=False, **self._template_kwargs)
        )

    def _load(self) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        options = {
            key: self._model_kwargs[key]
            for key in ("revision", "trust_remote_code")
            if key in self._model_kwargs
        }
        tokenizer = self._tokenizer or AutoTokenizer.from_pretrained(self.name, **options)
        model: Any = self._given
        if isinstance(model, str):
            model = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1, **self._model_kwargs
            )
            model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The classifier reads the last token that is no padding, and must know which is.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self._tokenizer, self._model = tokenizer, model.eval()
