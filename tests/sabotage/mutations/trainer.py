"""Of trainers with TRL's signatures: what their state, their files and their callbacks are told."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

RUNS = "tests/compat/test_trainer_runs.py::"
MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="prompts_in_the_same_order_in_each_pass",
        why="every epoch takes the rows in the order of the first, where TRL shuffles anew",
        file="compat/rows.py",
        old="            torch.randperm(count, generator=generator)\n",
        new="            pass\n",
        tests=("tests/compat/test_rows.py::test_prompts_come_in_the_order_of_trls_sampler",),
    ),
    Mutation(
        name="flags_between_updates_are_lost",
        why="a checkpoint or an evaluation that falls between two updates of a batch never comes",
        file="compat/flow.py",
        old="            self._owed[flag] |= getattr(trainer.control, flag)\n",
        new="            self._owed[flag] |= False\n",
        tests=(RUNS + "test_what_falls_between_two_updates_comes_at_the_end_of_their_batch",),
    ),
    Mutation(
        name="the_best_checkpoint_is_dropped",
        why="save_total_limit takes the checkpoint that load_best_model_at_end wants",
        file="compat/training.py",
        old="        kept = {there[-1].path, Path(best)} if best else {there[-1].path}\n",
        new="        kept = {there[-1].path}\n",
        tests=(RUNS + "test_checkpoints_that_are_too_many_are_dropped_but_not_the_best",),
    ),
    Mutation(
        name="the_worst_model_is_the_best",
        why="load_best_model_at_end without a metric takes the checkpoint of the lowest reward",
        file="compat/best.py",
        old="        args.greater_is_better = True\n",
        new="        args.greater_is_better = False\n",
        tests=(RUNS + "test_the_best_model_is_the_best_rewarded_where_nothing_else_is_named",),
    ),
    Mutation(
        name="what_is_changed_on_a_trainer_is_ignored",
        why="args.learning_rate or train_dataset that a script sets on a trainer change nothing",
        file="compat/training.py",
        old="        if self._asking() != self._asked or",
        new="        if False and",
        tests=("tests/compat/test_attributes.py::test_what_is_changed_on_a_trainer_is_planned_anew",),
    ),
    Mutation(
        name="optimizer_states_are_uploaded",
        why="the model on the Hub comes with moments twice its size",
        file="compat/hub.py",
        old="message, ignore_patterns=STATES)]",
        new="message)]",
        tests=("tests/compat/test_saving.py::test_what_is_saved_is_uploaded_where_that_is_asked_for",),
    ),
    Mutation(
        name="wrong_tokens_are_right",
        why="mean_token_accuracy counts the tokens that the model would not have said",
        file="learn/logprobs.py",
        old="argmax(-1) == targets_N",
        new="argmax(-1) != targets_N",
        tests=("tests/learn/test_model.py::test_chunks_change_neither_values_nor_gradients",),
    ),
    Mutation(
        name="what_was_played_after_a_checkpoint_is_taken_again",
        why="going back to a checkpoint repeats the episodes that were to be played anew",
        file="compat/directory.py",
        old='(f"trajectories/{self.stage}.jsonl", lambda line: decode_id(line) in used),',
        new='(f"trajectories/{self.stage}.jsonl", lambda line: True),',
        tests=(RUNS + "test_an_earlier_checkpoint_can_be_gone_on_from",),
    ),
    Mutation(
        name="a_resumed_trainer_forgets_its_state",
        why="global_step and the log begin at 0 again, and checkpoints get wrong numbers",
        file="compat/training.py",
        old="                    else self._restored_state(found, self.plan.max_steps)\n",
        new="                    else self._new_state(self.plan.max_steps)\n",
        tests=(RUNS + "test_a_run_that_was_stopped_goes_on_exactly",),
    ),
    Mutation(
        name="reference_without_the_adapters_it_began_with",
        why="the KL term of a model that came with adapters pulls it to the model without them",
        file="learn/model.py",
        old="        if self.lora and REFERENCE in self.module.peft_config:\n",
        new="        if False:\n",
        tests=(
            "tests/compat/test_models.py::test_adapters_that_are_trained_further_are_their_own_reference",
        ),
    ),
)
