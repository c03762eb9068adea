"""The fields of transformers' ``TrainingArguments``, which every trainer has."""

from __future__ import annotations

from turnwise.compat.fields import Fields, Honoured, Refused, Told

_FLOW = "transformers.trainer_callback"
_TRACKERS = "transformers.integrations.integration_utils"
_NO_LOADER = "rows are read once, and there is no data loader"
_NO_PREDICTION = "evaluation plays episodes and predicts no labels; leave it out"
_KERNELS = "logits never exist for a whole batch here, which is what it saves"

_BATCHES: Fields = {
    "per_device_train_batch_size": Honoured(
        "times processes and `steps_per_generation`: episodes played at once, `rl.groups`; SFT: times "
        "`gradient_accumulation_steps`, `sft.batch`. Rows are packed, so it bounds memory only through "
        "`micro_tokens`"
    ),
    "gradient_accumulation_steps": Honoured(
        "`rl.minibatches`, `rl.epochs`: what makes an update; SFT: `sft.batch`"
    ),
    "num_train_epochs": Honoured("`rl.steps`, `sft.steps`, from the number of rows"),
    "max_steps": Honoured("`rl.steps`, `sft.steps`: optimizer steps, as in TRL"),
    "average_tokens_across_devices": Refused(
        "weights are fixed over a whole update, over all processes; leave it out"
    ),
    "auto_find_batch_size": Refused(
        "rows are packed into micro-batches of a fixed size: lower per_device_train_batch_size instead"
    ),
    "train_sampling_strategy": Refused(
        "rows are packed, so lengths need no grouping; for their own order use shuffle_dataset=False"
    ),
    "length_column_name": Refused("rows are packed, so lengths need no grouping; leave it out"),
}

_OPTIMIZER: Fields = {
    "learning_rate": Honoured("`optimizer.lr`"),
    "lr_scheduler_type": Honoured(
        "`optimizer.schedule`, `floor`: linear, cosine, cosine_with_min_lr, constant, constant_with_warmup"
    ),
    "lr_scheduler_kwargs": Honoured("`optimizer.floor`: `min_lr` or `min_lr_rate` of cosine_with_min_lr"),
    "warmup_steps": Honoured(
        "`optimizer.warmup_steps`, a share of all updates below 1. The first update has 1/n of the rate, "
        "not 0"
    ),
    "optim": Refused(
        "weights are moved by AdamW on float32 masters, fused: leave it out, or train adapters "
        "(peft_config) if its "
        "moments need too much memory",
        also=("adamw_torch", "adamw_torch_fused"),
    ),
    "optim_args": Refused("AdamW has none but adam_beta1, adam_beta2 and adam_epsilon; set these"),
    "optim_target_modules": Refused("it belongs to GaLore and its kin; train adapters (peft_config) instead"),
    "weight_decay": Honoured("`optimizer.weight_decay`, of matrices and embeddings"),
    "adam_beta1": Honoured("`optimizer.betas`"),
    "adam_beta2": Honoured("`optimizer.betas`"),
    "adam_epsilon": Honoured("`optimizer.eps`"),
    "max_grad_norm": Honoured("`optimizer.max_grad_norm`; 0 for none"),
    "label_smoothing_factor": Refused("losses are of what was sampled or demonstrated alone; leave it out"),
    "neftune_noise_alpha": Refused("embeddings get no noise: what is trained is what plays; leave it out"),
}

_NUMBERS: Fields = {
    "bf16": Honoured(
        "`model.dtype`: compute in bfloat16, on a CPU too; if not set, where a GPU has it. Masters are "
        "float32"
    ),
    "fp16": Refused("float16 overflows in training: use bf16=True, or neither for float32"),
    "tf32": Honoured("torch's own switch, which transformers sets", at="config"),
    "bf16_full_eval": Refused(
        "evaluation plays with the engine of training, in its type (bf16); leave it out"
    ),
    "fp16_full_eval": Refused(
        "evaluation plays with the engine of training, in its type (bf16); leave it out"
    ),
    "gradient_checkpointing": Honoured("`rows.gradient_checkpointing`"),
    "activation_checkpointing": Honoured("`rows.gradient_checkpointing`; the newer name"),
    "gradient_checkpointing_kwargs": Refused(
        "activations are always recomputed without reentrance; leave it out",
        also=({"use_reentrant": False}, {}),
    ),
    "activation_checkpointing_kwargs": Refused(
        "activations are always recomputed without reentrance; leave it out",
        also=({"use_reentrant": False}, {}),
    ),
    "torch_compile": Refused("rows have as many shapes as micro-batches: nothing is compiled; leave it out"),
    "torch_compile_backend": Refused("nothing is compiled; leave it out"),
    "torch_compile_mode": Refused("nothing is compiled; leave it out"),
    "use_liger_kernel": Told(_KERNELS),
    "liger_kernel_config": Told(_KERNELS),
    "use_cache": Refused(
        "the engine keeps what was computed between turns, whatever this says; leave it out",
        also=(True,),
    ),
    "torch_empty_cache_steps": Told("micro-batches are packed to one size, so little lies idle between them"),
    "full_determinism": Refused(
        "seeds fix what is drawn; for torch's kernels call torch.use_deterministic_algorithms(True) yourself"
    ),
    "seed": Honoured("`seed`: of adapters, the order of rows, and each episode's own"),
    "data_seed": Refused("the order of rows follows from seed, as in TRL's trainers; set that"),
    "use_cpu": Honoured("`model.device`, `engine.device`; of itself where there is no GPU"),
}

_LOGS: Fields = {
    "output_dir": Honoured("the run's directory: checkpoints, trajectories, metrics", at="compat"),
    "logging_strategy": Honoured("as in transformers", at=_FLOW),
    "logging_steps": Honoured("as in transformers: optimizer steps between two logs", at=_FLOW),
    "logging_first_step": Honoured("as in transformers", at=_FLOW),
    "log_on_each_node": Refused("the first process logs for all; leave it out", also=(False,)),
    "logging_nan_inf_filter": Refused(
        "an update whose loss is not finite is refused and counted (refused_updates), so there is none to"
        " filter"
    ),
    "include_num_input_tokens_seen": Honoured("`num_input_tokens_seen` in each log", at="compat"),
    "log_level": Refused(
        "use logging.getLogger('turnwise').setLevel(...), and transformers.logging for its own"
    ),
    "log_level_replica": Refused("beside the first process none logs; leave it out"),
    "disable_tqdm": Honoured("lines in place of a progress bar", at="compat"),
    "report_to": Honoured(
        "trackio, wandb, tensorboard and what else transformers knows; with episodes", at="compat"
    ),
    "run_name": Honoured("the trackers' name of the run", at=_TRACKERS),
    "project": Honoured("trackio's project", at=_TRACKERS),
    "trackio_space_id": Honoured("trackio's Space", at=_TRACKERS),
    "trackio_bucket_id": Honoured("trackio's bucket", at=_TRACKERS),
    "trackio_static_space_id": Honoured(
        "trackio's static Space; none is made where it is not set", at="compat"
    ),
    "debug": Refused("it is about TPUs and overflow of activations; leave it out", also=([], None)),
    "skip_memory_metrics": Refused(
        "memory is not measured; use torch.cuda.max_memory_allocated in a callback"
    ),
}

_EVALUATION: Fields = {
    "eval_strategy": Honoured(
        "as in transformers; between two updates of a step it waits for the step's end",
        at=_FLOW,
    ),
    "eval_steps": Honoured("as in transformers", at=_FLOW),
    "eval_delay": Honoured("as in transformers", at=_FLOW),
    "eval_on_start": Honoured("one evaluation before the first step", at="compat"),
    "per_device_eval_batch_size": Told(
        "an evaluation's episodes are all in flight, as many at a time as in training, in no batches"
    ),
    "prediction_loss_only": Refused(_NO_PREDICTION),
    "eval_do_concat_batches": Refused(_NO_PREDICTION),
    "eval_use_gather_object": Refused(_NO_PREDICTION),
    "eval_accumulation_steps": Refused(_NO_PREDICTION),
    "include_for_metrics": Refused(_NO_PREDICTION),
    "batch_eval_metrics": Refused(_NO_PREDICTION),
    "label_names": Refused(_NO_PREDICTION),
    "load_best_model_at_end": Honoured("as in transformers", at="compat"),
    "metric_for_best_model": Honoured(
        "as in transformers; if not set, `eval_reward`, or in SFT `eval_loss`", at="compat"
    ),
    "greater_is_better": Honoured("as in transformers", at="compat"),
}

_SAVING: Fields = {
    "save_strategy": Honoured(
        "as in transformers; between two updates of a step it waits for the step's end",
        at=_FLOW,
    ),
    "save_steps": Honoured("as in transformers", at=_FLOW),
    "save_total_limit": Honoured("as in transformers", at="compat"),
    "save_only_model": Refused(
        "a checkpoint is there to go on from; for the model alone call save_model in on_save"
    ),
    "save_on_each_node": Refused("the first process writes for all; share output_dir, or copy it"),
    "enable_jit_checkpoint": Refused(
        "episodes and steps are on disk as they end: a killed run goes on with "
        "train(resume_from_checkpoint=True)"
    ),
    "ignore_data_skip": Refused(
        "a resumed run goes on with the rows that come next, at no cost; leave it out"
    ),
    "restore_callback_states_from_checkpoint": Honoured("as in transformers", at="compat"),
    "resume_from_checkpoint": Honoured("hand it to `train`, as with transformers", at="script"),
    "push_to_hub": Honoured("at each save, as `hub_strategy` says, and in `save_model`", at="compat"),
    "hub_strategy": Honoured("as in transformers, in the background", at="compat"),
    "hub_always_push": Honoured(
        "a save waits until the one before it is uploaded; it is not uploaded itself else", at="compat"
    ),
    "hub_model_id": Honoured("where `push_to_hub` uploads to", at="compat"),
    "hub_token": Honoured("of `push_to_hub`", at="compat"),
    "hub_private_repo": Honoured("of `push_to_hub`", at="compat"),
    "hub_revision": Honoured("of `push_to_hub`", at="compat"),
}

_PROCESSES: Fields = {
    "fsdp": Honoured("`parallel.kind`: FSDP2 of whole layers, whatever else it names"),
    "fsdp_config": Refused("FSDP2 is set up by itself; set fsdp='full_shard' alone"),
    "deepspeed": Refused(
        "use fsdp='full_shard', which spreads weights, gradients and moments as ZeRO-3 does"
    ),
    "parallelism_config": Refused("rows are dealt out to processes whole; use fsdp='full_shard'"),
    "accelerator_config": Refused("there is no data loader to be dealt out; leave it out"),
    "ddp_timeout": Honoured("`parallel.timeout`"),
    "ddp_backend": Refused("nccl between GPUs, gloo else; leave it out"),
    "ddp_find_unused_parameters": Refused(
        "gradients are summed once for an update; leave it out", also=(False,)
    ),
    "ddp_bucket_cap_mb": Refused("gradients are summed once for an update; leave it out"),
    "ddp_broadcast_buffers": Refused("buffers do not change in training; leave it out", also=(False,)),
    "ddp_static_graph": Refused("gradients are summed once for an update; leave it out", also=(False,)),
    "local_rank": Refused("torchrun and accelerate launch say which process this is; leave it out"),
    "dataloader_drop_last": Refused(
        "a step is made of whole groups, whatever is left of a pass: leave it out", also=(True,)
    ),
    "dataloader_num_workers": Told(_NO_LOADER),
    "dataloader_pin_memory": Told(_NO_LOADER, also=(False,)),
    "dataloader_persistent_workers": Told(_NO_LOADER),
    "dataloader_prefetch_factor": Told(_NO_LOADER),
    "dataloader_multiprocessing_context": Refused(_NO_LOADER),
    "dataloader_in_order": Refused(_NO_LOADER),
}

_SCRIPT: Fields = {
    "do_train": Honoured("your script reads it, as with transformers", at="script"),
    "do_eval": Honoured("your script reads it; `eval_strategy` sets it", at="script"),
    "do_predict": Honoured("your script reads it, as with transformers", at="script"),
}

TRAINING: Fields = {
    **_BATCHES, **_OPTIMIZER, **_NUMBERS, **_LOGS, **_EVALUATION, **_SAVING, **_PROCESSES, **_SCRIPT,
    "remove_unused_columns": Honoured("a reward function gets the prompt's columns alone", at="compat"),
}  # fmt: skip
