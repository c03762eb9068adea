"""Supervised learning on conversations with tool calls: what a teacher says is learned, not what it hears.

python examples/trl/sft.py --max-steps 60
"""

from __future__ import annotations

import catch
from common import flags, lesson, policy, settings
from datasets import Dataset

from turnwise import SFTConfig, SFTTrainer


def main() -> None:
    args = flags(__doc__, "sft")
    lessons = [lesson(catch.Catch(), row, catch.teacher) for row in catch.rows(240)]
    trainer = SFTTrainer(
        model=policy(args, lessons, steps=1),
        args=SFTConfig(
            **settings(args),
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            assistant_only_loss=True,
            eval_strategy="steps",
            eval_steps=20,
        ),
        train_dataset=Dataset.from_list(lessons[40:]),
        eval_dataset=Dataset.from_list(lessons[:40]),
    )
    trainer.train()
    trainer.save_model(str(args.output_dir / "model"))


if __name__ == "__main__":
    main()
