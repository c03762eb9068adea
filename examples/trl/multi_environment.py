"""Two environments in one run: the ``environment`` column says which of them plays a row.

python examples/trl/multi_environment.py --max-steps 2
"""

from __future__ import annotations

import catch
import guess_number
from common import flags, lesson, policy, settings
from datasets import Dataset, concatenate_datasets

from turnwise import GRPOConfig, GRPOTrainer

ENVIRONMENTS = {"catch": catch.Catch, "guess": guess_number.GuessNumber}
TEACHERS = {"catch": catch.teacher, "guess": guess_number.teacher}


def main() -> None:
    args = flags(__doc__, "multi-environment")
    rows = {"catch": catch.rows(100), "guess": guess_number.rows(100)}
    lessons = [lesson(ENVIRONMENTS[name](), row, TEACHERS[name]) for name in rows for row in rows[name]]
    trainer = GRPOTrainer(
        model=policy(args, lessons),
        args=GRPOConfig(
            **settings(args),
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=160,
            learning_rate=1e-4,
        ),
        train_dataset=concatenate_datasets(  # Columns that an environment does not have are None.
            [Dataset.from_list([{**row, "environment": name} for row in rows[name]]) for name in rows]
        ),
        environment_factory=dict(ENVIRONMENTS),
    )
    trainer.train()


if __name__ == "__main__":
    main()
