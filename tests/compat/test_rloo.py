"""`RLOOTrainer` is the same trainer under another advantage, with the tools that TRL's does not take."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import trl

from tests.compat.trainers import ROWS, longer, model
from tests.support.tokenizers import tiny_tokenizer
from turnwise import GRPOTrainer, RLOOConfig, RLOOTrainer


def test_it_trains(tmp_path: Path) -> None:
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: Where.
        """
        return f"Rain in {city}."

    args = RLOOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=12, report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    made = RLOOTrainer(model(), longer, args, ROWS, processing_class=tiny_tokenizer(), tools=[weather])
    made.train()
    assert made.plan.recipe.rl is not None
    assert made.plan.recipe.rl.advantage == "rloo"
    lines: list[dict[str, Any]] = made.state.log_history
    assert lines[0]["kl"] is not None, "beta is 0.05 in RLOOConfig"
    assert "tools/call_frequency" in lines[0]


def test_signatures_have_all_that_trls_have_in_the_same_order() -> None:
    for ours, theirs in ((GRPOTrainer, trl.GRPOTrainer), (RLOOTrainer, trl.RLOOTrainer)):
        own, other = (list(inspect.signature(one.__init__).parameters) for one in (ours, theirs))
        assert [name for name in own if name in other] == other
