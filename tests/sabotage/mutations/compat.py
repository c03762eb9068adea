"""Of what TRL's scripts hand over: environments that functions look at, columns, rollouts by a function."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="broken_rewards_train_on",
        why="a reward function that scores nothing is retried until many episodes are lost",
        file="rollout/faults.py",
        old="if ends_run and blamed and broken:",
        new="if ends_run and blamed and broken and self._worked:",
        tests=(
            "tests/compat/test_reward_faults.py"
            "::test_a_function_that_scores_nothing_ends_the_run_by_its_own_error",
        ),
    ),
    Mutation(
        name="unscored_completions_are_worth_nothing",
        why="a completion that a TRL function could not score is paid 0, as if it had been judged bad",
        file="rollout/scoring.py",
        old="left_out = isinstance(score, EnvLostError) or function.contract is not None",
        new="left_out = isinstance(score, EnvLostError)",
        tests=(
            "tests/compat/test_reward_faults.py"
            "::test_completions_that_cannot_be_scored_are_left_out_told_of_and_counted",
        ),
    ),
    Mutation(
        name="get_reward_that_raises_pays_nothing",
        why="an episode whose get_reward raised is scored 0, as if it had been lost",
        file="envs/trl_class.py",
        old='with boundary(UnscoredError, "get_reward"):',
        new='with boundary(EnvError, "get_reward"):',
        tests=(
            "tests/compat/test_total_failures.py"
            "::test_an_episode_that_get_reward_cannot_score_is_left_out_and_told_of_once",
        ),
    ),
    Mutation(
        name="a_broken_environment_is_played_on",
        why="an environment that fails in every episode is tried until many are lost",
        file="compat/guarded.py",
        old="return env not in self._sound or",
        new="return env in self._sound and",
        tests=(
            "tests/compat/test_total_failures.py"
            "::test_an_environment_that_fails_in_all_siblings_ends_the_run_at_once",
        ),
    ),
    Mutation(
        name="learners_logprobs_shifted",
        why="a rollout_func's tokens get the log probabilities of others",
        file="compat/rollout_func.py",
        old="    at = len(rollout.prompt_ids)\n",
        new="    at = len(rollout.prompt_ids) + 1\n",
        tests=("tests/compat/test_rollout_func.py::test_logprobs_that_are_not_given_are_the_learners_own",),
    ),
    Mutation(
        name="rewards_not_in_turn",
        why="one function of a group reads what another group's wrote",
        file="rollout/scoring.py",
        old="in_turn = [function for function in functions if function.turn is not None]",
        new="in_turn = [function for function in functions if function.turn is None][:0]",
        tests=(
            "tests/compat/test_reward_faults.py"
            "::test_sync_functions_are_called_where_train_is_in_order_one_at_a_time",
        ),
    ),
    Mutation(
        name="environments_reset_before_they_are_scored",
        why="reward functions look at an instance that plays another episode by then",
        file="rollout/sessions.py",
        old=" = session, healthy\n",
        new=" = session, False\n        self._pool.release(session, healthy=True)\n",
        tests=(
            "tests/rollout/test_held_sessions.py::test_siblings_that_play_one_after_another_do_not_share_an_environment",
        ),
    ),
    Mutation(
        name="held_environments_are_lost",
        why="every group that is cancelled leaves its environments open",
        file="rollout/group.py",
        old="        if sessions is not None:\n            sessions.release()\n",
        new="        if sessions is not None and not held:\n            sessions.release()\n",
        tests=(
            "tests/rollout/test_held_sessions.py::test_cancelling_while_playing_or_scoring_gives_every_environment_back",
        ),
    ),
    Mutation(
        name="completion_budget_without_tool_results",
        why="episodes grow past max_completion_length by what tools answer",
        file="rollout/episode.py",
        old="        whole = self.record.prompt_tokens + completion\n",
        new="        whole = len(self.record.held_ids or ()) + completion\n",
        tests=(
            "tests/rollout/test_cut_short.py::test_a_budget_for_all_that_follows_the_prompt_counts_tool_results_too",
        ),
    ),
    Mutation(
        name="reward_attribute_paid_twice",
        why="an environment's attribute is paid beside the reward function that reads it",
        file="envs/trl_class.py",
        old="attribute = self.reward_name is None and hasattr",
        new="attribute = hasattr",
        tests=("tests/compat/test_rewards.py::test_environments_are_as_their_own_episodes_left_them",),
    ),
    Mutation(
        name="whatever_is_called_done_ends_the_episode",
        why="a class with a tool or a list of that name plays episodes of one call",
        file="envs/trl_class.py",
        old="ended = isinstance(done, bool | np.bool_) and bool(done)",
        new="ended = bool(done)",
        tests=("tests/envs/test_trl_class.py::test_only_true_is_done",),
    ),
    Mutation(
        name="results_are_told_as_json",
        why="a model that learned with TRL is told {'a': 1} in other words than there",
        file="envs/trl_class.py",
        old="return value if isinstance(value, str | Step) else str(value)",
        new="return value",
        tests=("tests/envs/test_trl_class.py::test_what_is_neither_text_nor_blocks_is_told_as_trl_tells_it",),
    ),
    Mutation(
        name="rows_with_what_stands_for_their_values",
        why="reward functions compare a date with the JSON that stands for it on disk",
        file="images.py",
        old="    if isinstance(value, Kept):\n        return value.value\n",
        new="",
        tests=("tests/compat/test_rows.py::test_what_is_no_json_is_kept_in_memory_and_stands_on_disk",),
    ),
    Mutation(
        name="siblings_of_an_earlier_run_without_their_values",
        why="a resumed group is scored with the JSON that stands for a column in half of its rows",
        file="pipeline/source.py",
        old="= replace(one, task=order.task)",
        new="= one",
        tests=(
            "tests/pipeline/test_long_runs.py::test_finished_siblings_have_the_row_with_what_it_keeps_in_memory",
        ),
    ),
    Mutation(
        name="streams_give_the_row_that_was_read_last",
        why="siblings' retries and resumed runs play another row than the one they are named for",
        file="compat/stream.py",
        old="return found[index % len(found)]",
        new="return found[-1]",
        tests=("tests/compat/test_stream.py::test_rows_are_read_when_they_are_asked_for_and_kept",),
    ),
    Mutation(
        name="nan_is_forfeited",
        why="what does not apply counts as a broken reply",
        file="compat/rewards.py",
        old="return None if isinstance(score, float) and math.isnan(score) else score",
        new="return score",
        tests=("tests/compat/test_rewards.py::test_numbers_of_any_kind_and_nan_for_none",),
    ),
    Mutation(
        name="columns_begin_again_at_each_call",
        why="what a function logs bit by bit all lands on the first completion",
        file="compat/rewards.py",
        old="kept.update(zip(episodes[start:], values, strict=False))",
        new="kept.update(zip(episodes, values, strict=False))",
        tests=(
            "tests/compat/test_rewards.py::test_columns_stay_with_their_episodes_though_groups_end_in_any_order",
        ),
    ),
    Mutation(
        name="thinking_hidden_from_reward_functions",
        why="rewards for a format never find the tags that they look for",
        file="compat/rewards.py",
        old="            if parsed or self.tokenizer is None or turn.ids is None:\n",
        new="            if True:\n",
        tests=(
            "tests/compat/test_rewards.py::test_without_tools_a_completion_is_the_text_that_was_written_thinking_too",
        ),
    ),
    Mutation(
        name="rollouts_learn_what_others_wrote",
        why="loss falls on the environment's tokens",
        file="compat/rollouts.py",
        old="            parts.append(([], [] if mine else None))\n",
        new="            parts.append(([], None if mine else []))\n",
        tests=(
            "tests/compat/test_rollout_func.py::test_the_mask_cuts_a_completion_into_turns_and_loss_falls_on_the_models_tokens_alone",
        ),
    ),
    Mutation(
        name="rollouts_take_the_most_probable_tokens_logprob",
        why="the sampled token is told to have been drawn with another's probability",
        file="compat/rollouts.py",
        old="        if tokens is not None and token in tokens:\n",
        new="        if tokens is not None and (token := tokens[0]) in tokens:\n",
        tests=(
            "tests/compat/test_rollout_func.py::test_log_probabilities_of_the_most_probable_tokens_as_vllms_client_nests_them",
        ),
    ),
    Mutation(
        name="rollouts_of_siblings_swapped",
        why="groups get one another's completions, and are paid for them",
        file="compat/rollout_func.py",
        old="            for share in shares:\n                own =",
        new="            for share in reversed(shares):\n                own =",
        tests=(
            "tests/compat/test_rollout_func.py::test_further_fields_reach_the_reward_functions_row_by_row",
        ),
    ),
    Mutation(
        name="rollout_siblings_sample_alike",
        why="a group's completions are all the same one",
        file="compat/generation.py",
        old='_seeded(sampling, f"{source.call}/{first + n}")',
        new='_seeded(sampling, f"{source.call}")',
        tests=(
            "tests/compat/test_rollout_func.py::test_completions_have_the_documented_form_and_may_be_handed_on",
        ),
    ),
    Mutation(
        name="reward_model_pads_unknown_to_it",
        why="the classifier reads the logit of padding",
        file="engines/reward_model.py",
        old="        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id\n",
        new="        model.config.get_text_config().pad_token_id = 0\n",
        tests=("tests/engines/test_reward_model.py::test_each_text_has_the_logit_that_it_has_alone",),
    ),
    Mutation(
        name="iterations_played_anew",
        why="each pass over what was played plays it again",
        file="compat/translate.py",
        old="minibatches, epochs = buffered // accumulated, iterations\n",
        new="minibatches, epochs = buffered // accumulated, 1\n",
        tests=("tests/compat/test_translate.py::test_optimizer_steps_are_counted_as_in_trl",),
    ),
    Mutation(
        name="accumulation_divides_the_prompts",
        why="what is played before an update shrinks with its micro-batches",
        file="compat/translate.py",
        old="1, 1, accumulated // (buffered * iterations)",
        new="1, 1, 1",
        tests=("tests/compat/test_translate.py::test_updates_of_several_generation_batches",),
    ),
    Mutation(
        name="updates_divided_by_their_own_tokens",
        why="updates of short episodes weigh as much as those of long ones, which TRL's do not",
        file="compat/translate.py",
        old='"update" if per_micro_batch else "step"',
        new='"update"',
        tests=("tests/compat/test_translate.py::test_updates_of_what_was_played_at_once",),
    ),
    Mutation(
        name="rare_environments_starve",
        why="an environment of a large data set takes the places of all others",
        file="compat/translate.py",
        old="dealt = dict.fromkeys(environments, 1)",
        new="dealt = dict.fromkeys(environments, 0)",
        tests=("tests/compat/test_translate.py::test_environments_share_a_step_as_they_share_the_rows",),
    ),
    Mutation(
        name="sequence_means_for_tokens",
        why="long replies weigh less than TRL lets them",
        file="compat/translate_loss.py",
        old='"dapo": "token"',
        new='"dapo": "sequence"',
        tests=("tests/compat/test_translate.py::test_losses[dapo 0.28-]",),
    ),
    Mutation(
        name="cap_read_as_a_clip",
        why="CISPO's ratios are cut at one more than asked for",
        file="compat/translate_loss.py",
        old='settings["clip_high"] = cap - 1',
        new='settings["clip_high"] = cap',
        tests=("tests/compat/test_translate.py::test_losses[cispo 5.0-]",),
    ),
    Mutation(
        name="cut_distributions_uncorrected",
        why="another distribution is trained than is sampled",
        file="compat/translate_loss.py",
        old='        if cuts:\n            return {"correction": _of_cuts(args, notes)}\n',
        new="",
        tests=("tests/compat/test_translate.py::test_corrections",),
    ),
    Mutation(
        name="refused_arguments_pass",
        why="a script runs on without what it asked for",
        file="compat/fields.py",
        old="if isinstance(field, Refused) and _differs(args, name, field)",
        new="if isinstance(field, Refused) and False",
        tests=("tests/compat/test_arguments.py::test_everything_that_is_wrong_is_in_one_message",),
    ),
)
