"""What scripts read of TRL's trainers beside their methods: arguments, rewards, the schedule, rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from turnwise.envs.session import EnvSpec
from turnwise.rollout.scoring import RewardFunction


class Argument:
    """An argument that TRL's trainers have as an attribute too.

    Args:
        name: In ``args``; the attribute's own if not given.
        default: The argument that stands for it where it is None.
    """

    def __init__(self, name: str | None = None, *, default: str | None = None) -> None:
        self._name, self._default = name, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._attribute, self._name = name, self._name or name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        assert self._name is not None
        value = getattr(trainer.args, self._name)
        return getattr(trainer.args, self._default) if value is None and self._default else value

    def __set__(self, trainer: Any, value: Any) -> None:
        raise AttributeError(
            f"trainer.{self._attribute} is read when training begins: set trainer.args.{self._name} before "
            "train()"
        )


class OnlineAttributes:
    """Of a trainer that plays."""

    args: Any
    model: Any
    given_rewards: Sequence[Any]
    """Reward functions as they were handed over."""
    functions: Sequence[RewardFunction]

    num_generations = Argument()
    num_generations_eval = Argument(default="num_generations")
    max_completion_length = Argument()
    max_tool_calling_iterations = Argument()
    temperature, top_p, top_k, min_p = Argument(), Argument(), Argument(), Argument()
    repetition_penalty = Argument()
    use_vllm, vllm_mode = Argument(), Argument()
    num_iterations = Argument()
    beta = Argument()
    epsilon_low, epsilon_high = Argument("epsilon"), Argument(default="epsilon")
    loss_type, scale_rewards, importance_sampling_level = Argument(), Argument(), Argument()
    normalize_advantages = Argument()
    mask_truncated_completions, shuffle_dataset = Argument(), Argument()
    log_completions, num_completions_to_print, log_unique_prompts = Argument(), Argument(), Argument()

    @property
    def reward_funcs(self) -> list[Any]:
        """As they were handed over; names of models as names."""
        return list(self.given_rewards)

    @property
    def reward_func_names(self) -> list[str]:
        """What the log calls them."""
        return [one.name for one in self.functions]

    @property
    def reward_weights(self) -> torch.Tensor:
        """One for each; set ``args.reward_weights`` before ``train()`` for others."""
        return torch.tensor([one.weight for one in self.functions], dtype=torch.float32)

    @property
    def ref_model(self) -> None:
        """None, as in TRL where there is no KL term or adapters are trained.

        Raises:
            AttributeError: There is a reference, which is no model of its own: the learner has its weights.
        """
        if self.args.beta and not hasattr(self.model, "peft_config"):
            raise AttributeError(
                "trainer.ref_model: the reference is no model beside the trained one; load the model that "
                "training starts from once more where you need it"
            )


class Environments(dict[str, EnvSpec]):
    """What plays, by name. TRL has a list of live ones there, which here are each episode's own."""

    def __missing__(self, key: object) -> EnvSpec:
        raise KeyError(
            f"trainer.environments has no {key!r}, only {', '.join(self)}; what is made of them lives for "
            "one episode: a reward function gets those of its completions by the keyword `environments`"
        )


class Rates:
    """What callbacks ask an ``lr_scheduler``: the rates of the last update. The optimizer sets them itself.

    Args:
        optimizer: The learner's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def get_last_lr(self) -> list[float]:
        """One for each group of parameters."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]


class Rows:
    """What callbacks ask a ``train_dataloader``: how many micro-batches a pass has, and of what.

    Args:
        dataset: What is trained on.
        batch_size: Rows, or episodes, of a micro-batch.
        batches: Of a pass.
    """

    def __init__(self, dataset: Any, *, batch_size: int, batches: int) -> None:
        self.dataset, self.batch_size, self._batches = dataset, batch_size, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(
            "train_dataloader has a length, a batch_size and a dataset here, and no batches: rows are taken "
            "as they are played or learned from; iterate over trainer.train_dataset"
        )
