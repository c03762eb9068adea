"""The fields that ``SFTConfig`` adds, and what `SFTTrainer` does with others' in its own way."""

from __future__ import annotations

from turnwise.compat.fields import Fields, Honoured, Refused, Told
from turnwise.compat.fields_rl import MODEL

_PACKED = "micro-batches are packed, whatever the data set's rows are, and a sequence never sees another"

SFT: Fields = {
    **MODEL,
    "chat_template_path": Honoured("the tokenizer's chat template from then on", at="compat"),
    "dataset_text_field": Honoured("the column of plain text", at="compat"),
    "dataset_kwargs": Refused("prepare the data set before you hand it over; rows with input_ids are taken"),
    "dataset_num_proc": Told("rows are rendered once, in this process"),
    "eos_token": Refused("set tokenizer.eos_token, and pass it as processing_class"),
    "max_length": Honoured("longest sequence in tokens", at="compat"),
    "truncation_mode": Honoured("which end of a longer one is kept", at="compat"),
    "shuffle_dataset": Honoured("shuffles rows before they are packed", at="compat"),
    "packing": Honoured("fills rows of `max_length` tokens, which are what batches count", at="compat"),
    "packing_strategy": Honoured("how they are filled", at="compat"),
    "padding_free": Told(_PACKED),
    "pad_to_multiple_of": Refused(f"{_PACKED}: nothing is padded; leave it out", also=(None, "none", "null")),
    "eval_packing": Honoured("`packing` of what is evaluated", at="compat"),
    "completion_only_loss": Honoured("where the loss falls", at="compat"),
    "assistant_only_loss": Honoured("where the loss falls, with any template", at="compat"),
    "loss_type": Refused("the loss is the cross-entropy of each token; leave it out", also=("chunked_nll",)),
    "activation_offloading": Refused("activations stay where they are; use gradient_checkpointing=True"),
    "pad_token": Refused(f"{_PACKED}: nothing is padded; leave it out"),
    "per_device_eval_batch_size": Honoured("the loss is a mean over batches of so many rows", at="compat"),
    "data_seed": Honoured("of the order of rows, in place of `seed`", at="compat"),
    "train_sampling_strategy": Honoured("random or sequential; rows are packed, so lengths need no grouping"),
    "dataloader_drop_last": Honoured("leaves out a pass's last rows that fill no batch", at="compat"),
    "remove_unused_columns": Refused("columns that are not needed are not read; leave it out", also=(False,)),
}
