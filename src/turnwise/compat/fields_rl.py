"""The fields that ``GRPOConfig`` and ``RLOOConfig`` add."""

from __future__ import annotations

from turnwise.compat.fields import Fields, Honoured, Refused, Told

_REFERENCE = "the reference is the model that training began with; for another, begin a new run from it"
_ENTROPY = "entropy_coef is fixed; lower or raise it in a new run"
_SERVERS = (
    "it is of vLLM in this process: a server's command line has its own, the embedded engine needs none"
)
_BATCHING = "the embedded engine batches continuously itself; leave it out"

MODEL: Fields = {
    "model_init_kwargs": Honoured(
        "`from_pretrained`'s, of a model by name; weights become float32 masters", at="compat"
    ),
    "trust_remote_code": Honoured("of a model by name and its tokenizer", at="compat"),
    "router_aux_loss_coef": Refused(
        "experts are trained by the policy's loss alone; leave it out",
        also=(0.0,),
    ),
}

ONLINE: Fields = {
    **MODEL,
    "disable_dropout": Refused(
        "the model's dropout is always off: what is trained is what plays",
        also=(True,),
    ),
    "num_generations": Honoured("`rl.group_size`"),
    "num_generations_eval": Honoured("episodes of each row of an evaluation", at="compat"),
    "max_completion_length": Honoured(
        "`limits.max_completion`, `sampling.max_tokens`: of a whole episode, tool results included; "
        "`dr_grpo`'s constant"
    ),
    "ds3_gather_for_generation": Refused(
        "there is no DeepSpeed: the engine has a copy of the weights; leave it out"
    ),
    "shuffle_dataset": Honoured("the order of TRL's sampler", at="compat"),
    "pad_to_multiple_of": Refused("rows are packed, not padded; leave it out", also=(None, "none", "null")),
    "generation_batch_size": Honoured("`rl.groups`: episodes played at once"),
    "steps_per_generation": Honoured(
        "`rl.groups`, `rl.minibatches`; it or `gradient_accumulation_steps` must be a multiple of the other, "
        "or an update would begin in one generation batch and end in the next"
    ),
    "temperature": Honoured("`rl.sampling`; logprobs are those at this temperature"),
    "top_p": Honoured("`rl.sampling`, with `rl.correction` for what is cut"),
    "top_k": Honoured("`rl.sampling`, with `rl.correction` for what is cut"),
    "min_p": Honoured("`rl.sampling`, with `rl.correction` for what is cut"),
    "generation_kwargs": Honoured(
        "`rl.sampling`: temperature, top_p, top_k, min_p, max_tokens, max_new_tokens"
    ),
    "chat_template_kwargs": Honoured("`model.chat_template_kwargs`"),
    "repetition_penalty": Refused(
        "what is sampled would be another distribution than is trained; reward variety instead"
    ),
    "cache_implementation": Refused("the engine keeps KV its own way; leave it out"),
    "use_vllm": Honoured("`engine.kind` with `vllm_mode`, and `rl.correction`"),
    "vllm_mode": Honoured(
        "`server`: `engine.kind: vllm`. `colocate`: the embedded engine, which the run says"
    ),
    "vllm_model_impl": Refused("start the server with --model-impl instead"),
    "vllm_enable_sleep_mode": Told(_SERVERS),
    "vllm_structured_outputs_regex": Refused(
        "what is sampled would be another distribution than is trained; leave it out"
    ),
    "vllm_server_base_url": Honoured("`engine.urls`"),
    "vllm_server_host": Honoured("`engine.urls`"),
    "vllm_server_port": Honoured("`engine.urls`"),
    "vllm_server_timeout": Honoured("`engine.start_seconds`"),
    "vllm_group_port": Honoured(
        "`engine.nccl_port`, with `engine.weights: nccl`; as it is, weights go by file"
    ),
    "vllm_gpu_memory_utilization": Told(_SERVERS),
    "vllm_max_model_length": Honoured("`engine.max_context`"),
    "vllm_tensor_parallel_size": Refused(
        "the embedded engine is on one GPU: start servers with --tensor-parallel-size, and use "
        "vllm_mode='server'"
    ),
    "num_iterations": Honoured("`rl.epochs`"),
    "epsilon": Honoured("`rl.clip_low`, `rl.clip_high`"),
    "epsilon_high": Honoured("`rl.clip_high`; of `cispo` the cap itself"),
    "reward_weights": Honoured("weights of the reward functions", at="compat"),
    "mask_truncated_completions": Honoured(
        "`rl.overlong.mask`; a budget that ran out after a tool call counts"
    ),
    "sync_ref_model": Refused(_REFERENCE),
    "ref_model_mixup_alpha": Refused(_REFERENCE),
    "ref_model_sync_steps": Refused(_REFERENCE),
    "log_completions": Honoured("a table of episodes at each log", at="compat"),
    "log_multimodal": Refused("images are on disk with their episodes; in tables they are shown by name"),
    "num_completions_to_print": Honoured("rows of that table on the terminal", at="compat"),
    "log_unique_prompts": Honoured("one episode of each prompt in that table", at="compat"),
    "use_transformers_continuous_batching": Refused(_BATCHING, also=(True,)),
    "transformers_continuous_batching_config": Refused(_BATCHING),
    "use_transformers_paged": Refused(_BATCHING, also=(True,)),
}

OWN: Fields = {
    "tool_timeout": Honoured(
        "`limits.call_seconds`: the deadline of each reset, tool and `get_reward`, 300 s; None for none"
    ),
    "episode_timeout": Honoured(
        "`limits.seconds`: an episode that takes longer, 3600 s, is cut short and scored; None for none"
    ),
}
"""That TRL does not have."""

GRPO: Fields = {
    "cast_lm_head_to_fp32": Refused("logits are computed in float32 with bf16=False; leave it out"),
    "beta": Honoured("`rl.kl`"),
    "delta": Honoured("`rl.ratio_cap`"),
    "sapo_temperature_neg": Honoured("`rl.sapo.tau_negative`"),
    "sapo_temperature_pos": Honoured("`rl.sapo.tau_positive`"),
    "vespo_k_pos": Honoured("`rl.vespo.k_positive`"),
    "vespo_lambda_pos": Honoured("`rl.vespo.lambda_positive`"),
    "vespo_k_neg": Honoured("`rl.vespo.k_negative`"),
    "vespo_lambda_neg": Honoured("`rl.vespo.lambda_negative`"),
    "importance_sampling_level": Honoured("`rl.loss`: `gspo` in place of `ppo`; not with cispo, sapo, vespo"),
    "multi_objective_aggregation": Honoured("`rl.rewards`"),
    "scale_rewards": Honoured("`rl.scale`"),
    "loss_type": Honoured(
        "`rl.loss`, `rl.normalise`; `bnpo` is normalised over an update, not a micro-batch"
    ),
    "top_entropy_quantile": Refused(
        "which tokens are in it is known only when a whole update was scored; use 1.0, and entropy_coef "
        "for exploring"
    ),
    "entropy_coef": Honoured(
        "`rl.entropy`, averaged as the loss is; not with dr_grpo and luspo, which are no averages"
    ),
    "use_adaptive_entropy": Refused(_ENTROPY),
    "entropy_coef_min": Refused(_ENTROPY),
    "entropy_coef_max": Refused(_ENTROPY),
    "entropy_coef_delta": Refused(_ENTROPY),
    "entropy_target": Refused(_ENTROPY),
    "max_tool_calling_iterations": Honoured("`limits.max_tool_turns`"),
    "vllm_importance_sampling_correction": Honoured("`rl.correction.kind`"),
    "vllm_importance_sampling_mode": Honoured("`rl.correction.kind`"),
    "vllm_importance_sampling_clip_max": Honoured("`rl.correction.high`"),
    "vllm_importance_sampling_clip_min": Honoured("`rl.correction.low`"),
    "vllm_importance_sampling_cap": Honoured("`rl.correction.high`; the older name"),
    "off_policy_mask_threshold": Honoured("`rl.off_policy_kl`"),
    "use_bias_correction_kl": Honoured("`rl.kl_estimator`"),
    "log_completions_hub_repo": Refused(
        "nothing is uploaded unasked: the tables are in output_dir/completions"
    ),
}

RLOO: Fields = {
    "beta": Honoured("`rl.kl`, with `rl.kl_in: reward`"),
    "normalize_advantages": Honoured("`rl.scale: batch`"),
    "reward_clip_range": Refused("clip what your reward functions return"),
}
