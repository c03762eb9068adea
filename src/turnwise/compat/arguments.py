"""`GRPOConfig`, `RLOOConfig`, `SFTConfig`: TRL 1.16's arguments, every field with its name and default.

They are dataclasses over ``transformers.TrainingArguments``, so ``HfArgumentParser`` makes a command line of
them. What each field does here, or why it is refused, is in `turnwise.compat.fields` and docs/trl.md. What is
not given is chosen so that a config works where it is made, a laptop without a GPU included.

    GRPOConfig(output_dir="runs/catch", max_steps=100, num_generations=8, per_device_train_batch_size=8)
"""
# ruff: noqa: RUF009 - `_arg` makes a field, as `field` does.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from turnwise.compat.fields import check, fields_of
from turnwise.errors import RecipeError


def _arg(default: Any, help: str) -> Any:
    """A field with what ``--help`` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(repr=False)
class _Arguments(TrainingArguments):  # type: ignore[misc]  # transformers has no types
    """What all trainers share: other defaults than transformers', and the model."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    logging_steps: float = _arg(10, "Updates between two logs; below 1 a share of all updates.")
    gradient_checkpointing: bool = _arg(True, "Recompute activations in backward: less memory, more time.")
    bf16: bool | None = _arg(None, "Compute in bfloat16; if not set, where a GPU has it.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _arg(None, "More settings of the schedule.")
    model_init_kwargs: dict[str, Any] | str | None = _arg(None, "For from_pretrained, of a model by name.")
    trust_remote_code: bool = _arg(False, "Run Python code that comes with a model.")
    router_aux_loss_coef: float | None = _arg(None, "Weight of the load-balancing loss of experts.")

    def __post_init__(self) -> None:
        check(self)
        gpu, bf16_gpu = _accelerator()
        if not gpu:
            self.use_cpu = True  # What it comes to; said outright, transformers lets bfloat16 be.
        if self.bf16 is None:
            self.bf16 = bf16_gpu and not self.use_cpu and not self.fp16
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")  # Transformers warns about the old names.
            if getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        given = {name: getattr(self, name) for name in fields_of(type(self))}
        super().__post_init__()
        self._derived = {name: one for name in given if (one := getattr(self, name)) != given[name]}


@dataclass(repr=False)
class _OnlineArguments(_Arguments):
    """What GRPO and RLOO share."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *_Arguments._VALID_DICT_FIELDS,
        "generation_kwargs",
        "chat_template_kwargs",
        "transformers_continuous_batching_config",
    ]

    learning_rate: float = _arg(1e-6, "Peak learning rate.")
    remove_unused_columns: bool | None = _arg(False, "Keep nothing of a row but its prompt.")
    disable_dropout: bool = _arg(False, "Switch the model's dropout off.")
    num_generations: int | None = _arg(8, "Episodes of each prompt, which are compared with each other.")
    num_generations_eval: int | None = _arg(None, "The same in evaluation; if not set, num_generations.")
    max_completion_length: int | None = _arg(512, "Tokens of a whole episode after its prompt.")
    ds3_gather_for_generation: bool = _arg(True, "Of DeepSpeed ZeRO-3.")
    shuffle_dataset: bool | None = _arg(True, "Take the prompts in a shuffled order.")
    pad_to_multiple_of: int | str | None = _arg("auto", "Pad rows to a multiple of this.")
    generation_batch_size: int | None = _arg(None, "Episodes played at once; excludes steps_per_generation.")
    steps_per_generation: int | None = _arg(
        None, "Micro-batches played at once; if not set, gradient_accumulation_steps."
    )
    temperature: float = _arg(1.0, "Of sampling.")
    top_p: float = _arg(1.0, "Keep the likeliest tokens up to this probability.")
    top_k: int = _arg(0, "Keep so many of the likeliest tokens; 0 keeps all.")
    min_p: float | None = _arg(None, "Keep tokens at least so likely, as a share of the likeliest one.")
    generation_kwargs: dict[str, Any] | str | None = _arg(None, "More settings of generation.")
    chat_template_kwargs: dict[str, Any] | str | None = _arg(None, "Handed to the chat template.")
    repetition_penalty: float = _arg(1.0, "Above 1 makes tokens that are there already rarer.")
    cache_implementation: str | None = _arg(None, "Of generate().")
    use_vllm: bool = _arg(False, "Play with vLLM.")
    vllm_mode: str = _arg("colocate", "colocate or server.")
    vllm_model_impl: str = _arg("vllm", "Whose model code vLLM runs: vllm or transformers.")
    vllm_enable_sleep_mode: bool = _arg(False, "Free vLLM's memory while weights are updated.")
    vllm_structured_outputs_regex: str | None = _arg(None, "Let completions match this only.")
    vllm_server_base_url: str | None = _arg(None, "Of the vLLM server, in place of host and port.")
    vllm_server_host: str = _arg("0.0.0.0", "Of the vLLM server.")
    vllm_server_port: int = _arg(8000, "Of the vLLM server.")
    vllm_server_timeout: float = _arg(240.0, "Seconds to wait for the vLLM server.")
    vllm_group_port: int = _arg(51216, "Of the group in which weights are sent to the server.")
    vllm_gpu_memory_utilization: float = _arg(0.3, "Share of GPU memory for colocated vLLM.")
    vllm_max_model_length: int | None = _arg(None, "Longest context in tokens.")
    vllm_tensor_parallel_size: int = _arg(1, "GPUs that share colocated vLLM's tensors.")
    num_iterations: int = _arg(1, "Passes over what was played at once.")
    epsilon: float = _arg(0.2, "How far a ratio may fall before it is clipped, and rise.")
    epsilon_high: float | None = _arg(None, "How far it may rise, where that is not epsilon.")
    reward_weights: list[float] | None = _arg(None, "One for each reward function; if not set, 1.")
    mask_truncated_completions: bool = _arg(False, "No loss on episodes that were cut.")
    sync_ref_model: bool = _arg(False, "Let the reference follow the policy.")
    ref_model_mixup_alpha: float = _arg(0.6, "Share of the policy in the reference at each synchronisation.")
    ref_model_sync_steps: int = _arg(512, "Updates between synchronisations.")
    log_completions: bool = _arg(False, "Show episodes at each log.")
    log_multimodal: bool = _arg(True, "Log images with episodes.")
    num_completions_to_print: int | None = _arg(None, "How many are shown; if not set, all.")
    log_unique_prompts: bool = _arg(False, "Show one episode of each prompt.")
    use_transformers_continuous_batching: bool = _arg(False, "Play with transformers' own batching.")
    transformers_continuous_batching_config: dict[str, Any] | str | None = _arg(None, "Its settings.")
    use_transformers_paged: bool = _arg(False, "An older name for transformers' own batching.")
    tool_timeout: float | None = _arg(
        300.0, "Turnwise's own: seconds that one call into an environment may take; None for no deadline."
    )
    episode_timeout: float | None = _arg(
        3600.0, "Turnwise's own: seconds that an episode may take; None for no deadline."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pad_to_multiple_of = None  # Nothing else is taken; TRL's "auto" comes to the same.
        self._size_batches()

    def _size_batches(self) -> None:
        """Derive ``steps_per_generation`` and ``generation_batch_size`` from one another, as TRL does."""
        micro = self.per_device_train_batch_size * self.world_size
        if self.steps_per_generation is None and self.generation_batch_size is not None:
            if self.generation_batch_size % micro:
                raise RecipeError(
                    f"generation_batch_size is {self.generation_batch_size} and must be a multiple of "
                    f"per_device_train_batch_size × processes, {micro}"
                )
            self.steps_per_generation = self.generation_batch_size // micro
        self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
        size = micro * self.steps_per_generation
        if self.generation_batch_size not in (None, size):
            raise RecipeError(
                f"generation_batch_size is {self.generation_batch_size} and steps_per_generation="
                f"{self.steps_per_generation} makes {size}: set one of them"
            )
        self.generation_batch_size = size
        assert self.num_generations is not None
        if self.num_generations < 2:
            raise RecipeError(
                f"num_generations is {self.num_generations}; episodes of a prompt are compared with each "
                "other, and that takes at least 2"
            )
        if size % self.num_generations:
            raise RecipeError(
                f"{size} episodes are played at once (generation_batch_size), and that must be a multiple of "
                f"num_generations, {self.num_generations}; change per_device_train_batch_size or "
                "gradient_accumulation_steps"
            )


@dataclass(repr=False)
class GRPOConfig(_OnlineArguments):
    """Arguments of `turnwise.GRPOTrainer`."""

    cast_lm_head_to_fp32: bool = _arg(False, "Compute logits in float32.")
    beta: float = _arg(0.0, "Weight of the KL divergence to the starting model.")
    delta: float | None = _arg(None, "Bound on the ratio of tokens with a negative advantage.")
    sapo_temperature_neg: float = _arg(1.05, "Of loss_type=sapo, for negative advantages.")
    sapo_temperature_pos: float = _arg(1.0, "Of loss_type=sapo, for positive advantages.")
    vespo_k_pos: float = _arg(2.0, "Of loss_type=vespo.")
    vespo_lambda_pos: float = _arg(3.0, "Of loss_type=vespo.")
    vespo_k_neg: float = _arg(3.0, "Of loss_type=vespo.")
    vespo_lambda_neg: float = _arg(2.0, "Of loss_type=vespo.")
    importance_sampling_level: str = _arg("token", "Whose ratio is clipped: token or sequence.")
    multi_objective_aggregation: str = _arg(
        "sum_then_normalize", "Compare the sum of rewards, or (normalize_then_sum) each by itself."
    )
    scale_rewards: str = _arg("group", "Divide by the deviation of the group, of the batch, or by none.")
    loss_type: str = _arg("dapo", "grpo, dapo, dr_grpo, bnpo, cispo, sapo, luspo or vespo.")
    top_entropy_quantile: float = _arg(1.0, "Learn from the most uncertain tokens only.")
    entropy_coef: float = _arg(0.0, "Weight of the policy's entropy, which is raised.")
    use_adaptive_entropy: bool = _arg(False, "Let entropy_coef follow entropy_target.")
    entropy_coef_min: float = _arg(0.0, "Of use_adaptive_entropy.")
    entropy_coef_max: float = _arg(1.0, "Of use_adaptive_entropy.")
    entropy_coef_delta: float = _arg(0.005, "Of use_adaptive_entropy.")
    entropy_target: float = _arg(0.2, "Of use_adaptive_entropy.")
    max_tool_calling_iterations: int | None = _arg(None, "Replies of an episode that may call tools.")
    vllm_importance_sampling_correction: bool = _arg(True, "Weigh tokens by how the sampler drew them.")
    vllm_importance_sampling_mode: str = _arg("sequence_mask", "How: token or sequence, truncate or mask.")
    vllm_importance_sampling_clip_max: float | None = _arg(3.0, "Upper bound of these weights.")
    vllm_importance_sampling_clip_min: float | None = _arg(None, "Lower bound of these weights.")
    off_policy_mask_threshold: float | None = _arg(None, "Leave out bad episodes that are this far off.")
    use_bias_correction_kl: bool = _arg(True, "Multiply the KL term by the ratio.")
    log_completions_hub_repo: str | None = _arg(None, "Upload the episodes that are shown.")
    vllm_importance_sampling_cap: float | None = _arg(
        None, "An older name for vllm_importance_sampling_clip_max."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        scales: dict[Any, str] = {True: "group", False: "none"}
        self.scale_rewards = scales.get(self.scale_rewards, self.scale_rewards)
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap


@dataclass(repr=False)
class RLOOConfig(_OnlineArguments):
    """Arguments of `turnwise.RLOOTrainer`."""

    num_generations: int | None = _arg(2, "Episodes of each prompt, which are compared with each other.")
    beta: float = _arg(0.05, "Weight of the KL divergence to the starting model.")
    normalize_advantages: bool = _arg(False, "Divide by the deviation of the batch's advantages.")
    reward_clip_range: tuple[float, float] | None = _arg(None, "Clip rewards to this range.")


@dataclass(repr=False)
class SFTConfig(_Arguments):
    """Arguments of `turnwise.SFTTrainer`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*_Arguments._VALID_DICT_FIELDS, "dataset_kwargs"]

    learning_rate: float = _arg(2e-5, "Peak learning rate.")
    chat_template_path: str | None = _arg(None, "Chat template to use, a Jinja file or a tokenizer's.")
    dataset_text_field: str = _arg("text", "Column of plain text.")
    dataset_kwargs: dict[str, Any] | str | None = _arg(None, "More settings of the data set.")
    dataset_num_proc: int | None = _arg(None, "Processes that prepare the data set.")
    eos_token: str | None = _arg(None, "Token that ends a sequence.")
    max_length: int | None = _arg(1024, "Longest sequence in tokens.")
    truncation_mode: str = _arg("keep_start", "Which end of a longer one is kept.")
    shuffle_dataset: bool = _arg(False, "Shuffle the data set before it is packed.")
    packing: bool = _arg(False, "Put several sequences into one row.")
    packing_strategy: str = _arg("bfd", "How they are chosen.")
    padding_free: bool = _arg(False, "Put several sequences into one row without padding.")
    pad_to_multiple_of: int | str | None = _arg("auto", "Pad rows to a multiple of this.")
    eval_packing: bool | None = _arg(None, "The same as packing, in evaluation.")
    completion_only_loss: bool | None = _arg(None, "Loss on the completion alone.")
    assistant_only_loss: bool = _arg(False, "Loss on the assistant's messages alone.")
    loss_type: str = _arg("nll", "nll or dft.")
    activation_offloading: bool = _arg(False, "Keep activations in main memory.")
    pad_token: str | None = _arg(None, "Token to pad with.")


def _accelerator() -> tuple[bool, bool]:
    """Whether there is a GPU, and whether it computes in bfloat16."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    gpu = torch.cuda.is_available()
    return gpu, gpu and bool(is_torch_bf16_gpu_available())
