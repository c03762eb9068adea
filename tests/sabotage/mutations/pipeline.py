"""Of the pipeline: which episodes a step learns from, what a resumed run does again, what is reported."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="evaluation_on_training_tasks",
        why="held-out scores are of what was trained on",
        file="pipeline/evaluate.py",
        old='run.tasks(env, config.split, "evaluate")',
        new='run.tasks(env, "train", "evaluate")',
        tests=(
            "tests/pipeline/test_order.py::test_every_model_is_evaluated_on_the_same_episodes_and_no_two_of_a_task_are_one",
        ),
    ),
    Mutation(
        name="advantages_per_minibatch",
        why="a minibatch's advantages depend on what else is in it",
        file="pipeline/updates.py",
        old="own = [one for i in sorted(order[part :: config.minibatches]) for one in samples[i]]\n",
        new=(
            "mine = [groups[i] for i in sorted(order[part :: config.minibatches])]\n"
            "            credits = credit(mine, config)\n"
            "            own = [one for unit in _samples(mine, credits, config) for one in unit]\n"
        ),
        tests=("tests/pipeline/test_updates.py::test_minibatches_do_not_change_what_is_over_the_whole_step",),
    ),
    Mutation(
        name="step_wide_weights_of_one_update_in_many",
        why="the more updates a step has, the less each of them moves",
        file="pipeline/updates.py",
        old="config, config.minibatches))",
        new="config, 1))",
        tests=("tests/pipeline/test_updates.py::test_weights_over_the_step",),
    ),
    Mutation(
        name="divergence_is_rewarded",
        why="the policy is paid for leaving where it began",
        file="pipeline/kl_reward.py",
        old="Reward(value=-sums[one.id], weight=config.kl)",
        new="Reward(value=sums[one.id], weight=config.kl)",
        tests=("tests/pipeline/test_kl_reward.py::test_what_a_policy_has_moved_is_taken_off_its_reward",),
    ),
    Mutation(
        name="rows_without_advantage_dropped_first",
        why="what is left weighs more the fewer there are",
        file="pipeline/updates.py",
        old="    weighed = weigh(\n        samples,\n",
        new=("    weighed = weigh(\n        [sample for sample in samples if sample.advantages_T.any()],\n"),
        tests=(
            "tests/pipeline/test_updates.py::test_rows_without_advantage_are_left_out_and_change_no_weight",
        ),
    ),
    Mutation(
        name="kl_only_where_there_is_an_advantage",
        why="groups that agree drift away from the reference unseen",
        file="pipeline/updates.py",
        old='every = (config.kl > 0 and config.kl_in == "loss") or config.entropy > 0',
        new="every = False",
        tests=(
            "tests/pipeline/test_updates.py::test_rows_without_advantage_are_left_out_and_change_no_weight",
        ),
    ),
    Mutation(
        name="old_logprobs_after_the_first_update",
        why="later updates of a step compare with themselves",
        file="pipeline/rl.py",
        old='if config.correction.kind != "none" and len(updates) > 1:',
        new='if config.correction.kind != "none" and len(updates) > 99:',
        tests=("tests/pipeline/test_stages.py::test_old_logprobs_are_those_before_the_steps_first_update",),
    ),
    Mutation(
        name="sft_order_restarts",
        why="a resumed run learns from the first lessons again",
        file="pipeline/sft.py",
        old="_recorded(run, config, Demonstrations(run.renderer(model)), info)\n",
        new=(
            "_recorded(run, config, Demonstrations(run.renderer(model)), info)\n"
            "        whole, first = lessons, done\n        lessons = lambda update: whole(update - first)\n"
        ),
        tests=("tests/pipeline/test_resume.py::test_a_killed_sft_goes_on_with_the_lessons_that_are_next",),
    ),
    Mutation(
        name="stages_play_the_same_tasks",
        why="RL plays the tasks that were collected from, in their order",
        file="pipeline/tasks.py",
        old='f"{env}/{split}/{salt}".encode()',
        new='f"{env}/{split}".encode()',
        tests=("tests/pipeline/test_order.py::test_tasks_come_in_permutations_and_stages_in_their_own",),
    ),
    Mutation(
        name="episodes_of_one_seed",
        why="the environment's chance is the same in every task",
        file="pipeline/tasks.py",
        old="0x5EED, index]",
        new="0x5EED]",
        tests=("tests/pipeline/test_order.py::test_tasks_come_in_permutations_and_stages_in_their_own",),
    ),
    Mutation(
        name="greedy_is_sampled",
        why="what is reported as greedy was drawn at the training temperature",
        file="pipeline/context.py",
        old="temperature=0.0 if greedy else config.temperature",
        new="temperature=config.temperature",
        tests=("tests/pipeline/test_attempts.py::test_an_outage_does_not_stay_in_an_evaluation",),
    ),
    Mutation(
        name="best_of_leaks_into_the_mean",
        why="the mean over a task's episodes is its best one",
        file="pipeline/stats.py",
        old="means = [float(np.mean(values))",
        new="means = [float(np.max(values))",
        tests=("tests/pipeline/test_stats.py::test_one_task_has_a_degenerate_interval",),
    ),
    Mutation(
        name="pass_at_k_with_replacement",
        why="pass@k is biased downwards",
        file="pipeline/stats.py",
        old="1.0 - comb(n - c, k) / comb(n, k)",
        new="1.0 - (1 - c / n) ** k",
        tests=("tests/pipeline/test_stats.py::test_pass_at_k_is_the_unbiased_estimator",),
    ),
    Mutation(
        name="gain_upside_down",
        why="a stage that got worse is reported as a gain",
        file="pipeline/stats.py",
        old="np.mean(after[task]) - np.mean(before[task])",
        new="np.mean(before[task]) - np.mean(after[task])",
        tests=("tests/pipeline/test_stats.py::test_pairing_removes_task_difficulty",),
    ),
    Mutation(
        name="failures_are_zeros_in_the_summary",
        why="an outage during evaluation looks like a bad model",
        file="pipeline/summary.py",
        old="= task, trajectory.reward\n",
        new="= task, trajectory.reward or 0.0\n",
        tests=("tests/pipeline/test_summary.py::test_stages_pair_by_task_and_failures_are_no_zeros",),
    ),
    Mutation(
        name="siblings_alike_in_evaluation",
        why="pass@k is of k times the same episode",
        file="pipeline/evaluate.py",
        old="                    sibling=k,\n",
        new="                    sibling=0,\n",
        tests=(
            "tests/pipeline/test_order.py::test_every_model_is_evaluated_on_the_same_episodes_and_no_two_of_a_task_are_one",
        ),
    ),
    Mutation(
        name="stages_evaluated_on_different_tasks",
        why="the gain is of other tasks, not of another model",
        file="pipeline/evaluate.py",
        old='run.tasks(env, config.split, "evaluate")',
        new="run.tasks(env, config.split, model_stage)",
        tests=(
            "tests/pipeline/test_order.py::test_every_model_is_evaluated_on_the_same_episodes_and_no_two_of_a_task_are_one",
        ),
    ),
    Mutation(
        name="mask_takes_siblings_baseline",
        why="siblings are no longer compared with what is masked",
        file="pipeline/selection.py",
        old="groups = [self._penalised(group) for group in played]",
        new=(
            "groups = [replace(g := self._penalised(group), trajectories=tuple(one for one in "
            "g.trajectories if not masked(one, self._config))) for group in played]"
        ),
        tests=(
            "tests/pipeline/test_selection.py::test_no_loss_falls_on_what_is_masked_and_siblings_are_still_compared_with_it",
        ),
    ),
    Mutation(
        name="overlong_mask_ignored",
        why="episodes that ran into a limit are learned from",
        file="pipeline/updates.py",
        old="without_loss(one) if masked(trajectory, config) else one",
        new="one",
        tests=(
            "tests/pipeline/test_selection.py::test_no_loss_falls_on_what_is_masked_and_siblings_are_still_compared_with_it",
        ),
    ),
    Mutation(
        name="masked_tokens_in_the_denominator",
        why="what is masked makes the rest weigh less",
        file="pipeline/selection.py",
        old="loss_mask_T=np.zeros_like(sample.loss_mask_T)",
        new="loss_mask_T=sample.loss_mask_T",
        tests=(
            "tests/pipeline/test_selection.py::test_no_loss_falls_on_what_is_masked_and_siblings_are_still_compared_with_it",
        ),
    ),
    Mutation(
        name="penalty_among_the_measured_rewards",
        why="rewards go down in the report because replies got longer",
        file="pipeline/rl.py",
        old="**group_metrics(groups, version=version, learned=selection.groups),",
        new="**group_metrics(selection.groups, version=version, learned=selection.groups),",
        tests=("tests/pipeline/test_selection.py::test_what_is_told_of_rewards_is_without_penalties",),
    ),
    Mutation(
        name="penalty_without_its_cache",
        why="replies that only come near the limit are not penalised, those at it fully",
        file="pipeline/selection.py",
        old="(max_tokens - cache - tokens) / cache",
        new="(max_tokens - tokens) / cache",
        tests=("tests/pipeline/test_selection.py::test_the_penalty_is_trls[100-20]",),
    ),
    Mutation(
        name="flat_groups_kept_and_others_dropped",
        why="what teaches is thrown away and what does not is learned from",
        file="pipeline/selection.py",
        old="kept = [group for group in groups if self._useful(group)]",
        new="kept = [group for group in groups if not self._useful(group)]",
        tests=("tests/pipeline/test_selection.py::test_groups_without_a_difference_are_kept_or_left_out",),
    ),
    Mutation(
        name="dropped_groups_forgotten",
        why="a resumed run plays again what a step had used up and dropped",
        file="pipeline/rl.py",
        old="trajectory_ids=tuple(one.id for group in groups for one in group.trajectories)",
        new=(
            "trajectory_ids=tuple(one.id for group in groups if group.id not in "
            "selection.dropped for one in group.trajectories)"
        ),
        tests=("tests/pipeline/test_resume.py::test_what_a_step_dropped_is_used_up",),
    ),
    Mutation(
        name="spent_groups_played_again",
        why="a resumed run plays and learns once more what it has learned",
        file="pipeline/rl.py",
        old="        source.spend(record.trajectory_ids, ",
        new="        source.spend((), ",
        tests=("tests/pipeline/test_resume.py::test_what_a_step_dropped_is_used_up",),
    ),
    Mutation(
        name="recorded_after_it_was_learned",
        why="a kill between the two makes a step that no resumed run can redo",
        file="pipeline/rl.py",
        old=(
            "            run.directory.append_step(record)\n            learned = await "
            "asyncio.to_thread(\n                _learn, learner, selection.groups, config, "
            "run.recipe.seed, step, run.given.watcher\n            )\n"
        ),
        new=(
            "            learned = await asyncio.to_thread(\n                _learn, learner, "
            "selection.groups, config, run.recipe.seed, step, run.given.watcher\n            )\n            "
            "run.directory.append_step(record)\n"
        ),
        tests=("tests/pipeline/test_resume.py::test_what_a_step_dropped_is_used_up",),
    ),
    Mutation(
        name="attempts_of_another_harness_count",
        why="episodes played under other limits or rewards are mixed in",
        file="pipeline/attempts.py",
        old='record["harness"] == harness[order.env]',
        new="True",
        tests=(
            "tests/pipeline/test_resume.py::test_episodes_of_another_harness_are_played_again_and_no_longer_count",
        ),
    ),
    Mutation(
        name="siblings_of_another_task",
        why="siblings on disk of another task, seed or sampling join the group",
        file="pipeline/source.py",
        old="if all(self._as_ordered(one, order) for one in begun):",
        new="if True:",
        tests=("tests/pipeline/test_resume.py::test_siblings_of_another_task_or_sampling_are_never_mixed",),
    ),
    Mutation(
        name="every_attempt_counts",
        why="an episode that was played again is learned from twice",
        file="pipeline/attempts.py",
        old="if last[episode_of(trajectory.id)] == trajectory.id:",
        new="if last[episode_of(trajectory.id)]:",
        tests=(
            "tests/pipeline/test_resume.py::test_episodes_of_another_harness_are_played_again_and_no_longer_count",
        ),
    ),
    Mutation(
        name="everything_collected_is_kept",
        why="failed demonstrations are learned too",
        file="pipeline/collect.py",
        old="if least is None or trajectory.reward >= least:",
        new="if least is None or trajectory.reward is not None:",
        tests=("tests/pipeline/test_stages.py::test_what_is_kept_is_decided_when_it_is_read",),
    ),
    Mutation(
        name="held_out_episodes_are_lessons",
        why="SFT learns from the tasks that it is evaluated on",
        file="pipeline/sft.py",
        old='if not stage.startswith(evaluation_stage(""))',
        new='if not stage.startswith("-")',
        tests=(
            "tests/pipeline/test_stages.py::test_another_run_as_a_source_gives_all_but_its_held_out_episodes",
        ),
    ),
)
