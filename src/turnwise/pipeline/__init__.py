"""The stages of a run (collect, sft, rl, evaluate) and what chains them."""
