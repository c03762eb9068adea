"""The mutations: one line each, of the kind that leaves a run looking well.

Each names the tests that must fail, so that a guard that was lost is noticed and not made up for by chance.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One line, broken."""

    name: str
    why: str
    """What would go wrong, for whoever trains on it."""
    file: str
    """Under ``src/turnwise``."""
    old: str
    """Text that stands in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """Pytest ids; at least one must fail."""

    def apply(self, source: str) -> str:
        """The file's text with the line broken.

        Raises:
            ValueError: ``old`` is not in it exactly once: the mutation has to follow the code.
        """
        if (found := source.count(self.old)) != 1:
            raise ValueError(
                f"mutation {self.name}: {self.old!r} is {found} times in {self.file}; it must be there once"
            )
        return source.replace(self.old, self.new)


MUTATIONS: tuple[Mutation, ...] = (
    # -- tokens and masks --------------------------------------------------------------------------------
    Mutation(
        name="mask_shifted_by_one",
        why="loss falls on the token after each reply and misses its first",
        file="learn/samples.py",
        old="mask_T[start:end] = True",
        new="mask_T[start + 1 : end + 1] = True",
        tests=("tests/learn/test_samples.py::test_rl_samples_are_the_recorded_ids",),
    ),
    Mutation(
        name="mask_is_everything",
        why="SFT learns the prompts and the environment's words too",
        file="learn/samples.py",
        old="mask_T = np.zeros(length, dtype=np.bool_)",
        new="mask_T = np.arange(length) > 0",
        tests=("tests/learn/test_samples.py::test_a_demonstration_is_prompt_replies_and_bridges",),
    ),
    Mutation(
        name="newline_dropped_in_bridge",
        why="every turn boundary lacks the newline that the template writes there",
        file="chat/bridge.py",
        old='return "".join(parts)',
        new='return "".join(parts).replace("\\n", "", 1)',
        tests=("tests/chat/test_bridge.py::test_bridged_ids_are_the_whole_rendering",),
    ),
    Mutation(
        name="stop_token_doubled_by_bridge",
        why="a reply that ended itself is ended once more",
        file="chat/bridge.py",
        old="return ids[1:] if closed else ids",
        new="return ids",
        tests=("tests/chat/test_bridge.py::test_bridged_ids_are_the_whole_rendering",),
    ),
    Mutation(
        name="control_tokens_from_observations",
        why="a tool result that holds <|im_end|> ends the turn",
        file="chat/encoding.py",
        old="return _broken(text, self.control - allow if allow else self.control)",
        new="return text",
        tests=("tests/chat/test_bridge.py::test_control_tokens_in_observations_are_text",),
    ),
    Mutation(
        name="mentioned_calls_run",
        why="a call that the policy only repeats, in ordinary tokens, is made",
        file="chat/encoding.py",
        old="if _BREAK not in text and len(_whole(tokens).findall(text)) == sampled:",
        new="if _BREAK not in text:",
        tests=("tests/chat/test_renderer.py::test_a_call_that_is_only_mentioned_is_text",),
    ),
    Mutation(
        name="thinking_opened_whatever_asks",
        why="a reply to a tool's result is read as if it answered a question",
        file="chat/renderer.py",
        old="self.dialect.parse(text, thinking=self.opens_thinking(context_ids), tools=tools)",
        new="self.dialect.parse(text, thinking=self.template.opens_thinking, tools=tools)",
        tests=("tests/chat/test_reply.py::test_what_opens_the_thinking_is_the_replys_own_context",),
    ),
    Mutation(
        name="held_tokens_rendered_again",
        why="what was sampled is decoded and encoded again at every turn",
        file="rollout/policies.py",
        old="if context.held_ids is not None:\n            bridge",
        new="if context.held_ids is None:\n            bridge",
        tests=(
            "tests/rollout/test_model_policy.py::test_tokens_in_are_tokens_out_and_a_turn_is_extended_by_a_bridge",
        ),
    ),
    Mutation(
        name="target_is_the_token_itself",
        why="each token's probability is read one position late",
        file="learn/model.py",
        old="before_N = loss_L - 1",
        new="before_N = loss_L",
        tests=("tests/learn/test_learner.py::test_cross_entropy_is_transformers_own_labels_loss",),
    ),
    Mutation(
        name="positions_run_over_documents",
        why="packed samples see one another",
        file="learn/batch.py",
        old="positions_BT[b, start:] = np.arange(length - start)",
        new="positions_BT[b, start:] = np.arange(start, length)",
        tests=("tests/learn/test_batch.py::test_two_samples_in_a_row",),
    ),
    # -- probabilities and versions ----------------------------------------------------------------------
    Mutation(
        name="old_logprobs_from_the_learner",
        why="the ratio is 1 always, so that nothing is ever clipped or corrected",
        file="learn/learner.py",
        old="sampler_logprobs_N=tensor(batch.logprobs_BT[mask_BT])",
        new="sampler_logprobs_N=logprobs_N.detach()",
        tests=("tests/learn/test_trl.py::test_loss_and_gradients_equal_trls",),
    ),
    Mutation(
        name="temperature_forgotten_by_the_learner",
        why="logprobs are of another policy than the one that sampled",
        file="learn/logprobs.py",
        old="logits_NV = logits_NV / temperatures_N[:, None]",
        new="logits_NV = logits_NV * 1",
        tests=("tests/learn/test_model.py::test_packed_rows_score_as_each_sample_alone",),
    ),
    Mutation(
        name="untempered_logprobs_recorded",
        why="the engine records the probabilities of the untempered policy",
        file="engines/sampling.py",
        old="logprobs=logprobs.gather(1, ids)[:, 0].tolist(),",
        new="logprobs=(logits * 0.5).log_softmax(-1).gather(1, ids)[:, 0].tolist(),",
        tests=("tests/engines/test_sampling.py::test_logprobs_and_kept_mass_of_replies",),
    ),
    Mutation(
        name="kept_mass_forgotten",
        why="nobody knows that top-p cut the distribution",
        file="engines/sampling.py",
        old="return torch.zeros_like(mass).scatter_(1, order, left), left.sum(-1)",
        new="return torch.zeros_like(mass).scatter_(1, order, left), torch.ones_like(left.sum(-1))",
        tests=("tests/engines/test_sampling.py::test_cuts_logprobs_and_kept_mass_equal_the_reference",),
    ),
    Mutation(
        name="stale_kv_after_an_update",
        why="turns go on from keys and values of the old weights",
        file="engines/core.py",
        old="        self._table.forget()\n",
        new="",
        tests=(
            "tests/engines/test_versions.py::test_new_weights_answer_and_the_given_model_is_untouched",
            "tests/engines/test_versions.py::test_idle_sessions_and_shared_prefixes_are_void_after_an_update",
        ),
    ),
    Mutation(
        name="kv_of_another_prefix",
        why="a prompt goes on from KV that only nearly belongs to it",
        file="engines/slots.py",
        old="return int(unequal.argmax()) if unequal.any() else limit",
        new="return limit",
        tests=(
            "tests/engines/test_generate.py::test_a_session_whose_context_was_rewritten_keeps_the_common_beginning",
        ),
    ),
    Mutation(
        name="version_not_raised",
        why="samples of every age count as fresh",
        file="learn/learner.py",
        old="            self.version += 1\n",
        new="",
        tests=("tests/learn/test_learner.py::test_version_and_freshness",),
    ),
    Mutation(
        name="siblings_sample_alike",
        why="siblings draw the same tokens: there is nothing to compare",
        file="rollout/episode.py",
        old="{self.order.seed}/{self.order.sibling}/{record.turns}",
        new="{self.order.seed}/{record.turns}",
        tests=("tests/rollout/test_episode.py::test_each_turn_has_a_seed_of_its_own_the_same_in_every_run",),
    ),
    Mutation(
        name="turns_sample_alike",
        why="every turn of an episode draws with the same randomness",
        file="rollout/episode.py",
        old="{self.order.sibling}/{record.turns}",
        new="{self.order.sibling}",
        tests=("tests/rollout/test_episode.py::test_each_turn_has_a_seed_of_its_own_the_same_in_every_run",),
    ),
    # -- episodes ----------------------------------------------------------------------------------------
    Mutation(
        name="siblings_from_different_seeds",
        why="siblings play different games and are compared all the same",
        file="rollout/group.py",
        old="                seed=self.seed,\n",
        new="                seed=self.seed + k,\n",
        tests=("tests/rollout/test_group.py::test_siblings_start_alike",),
    ),
    Mutation(
        name="failures_scored_zero",
        why="a lost server teaches the policy that it was wrong",
        file="types/trajectory.py",
        old="        if self.stop_reason.failed:\n            return None\n",
        new="        if self.stop_reason.failed:\n            return 0.0\n",
        tests=(
            "tests/learn/test_advantages.py::test_failed_siblings_are_absent_from_the_baseline",
            "tests/rollout/test_episode.py::test_a_lost_environment_is_excluded_and_what_was_done_is_kept",
        ),
    ),
    Mutation(
        name="budget_ends_look_like_success",
        why="an episode that ran out of turns counts as finished",
        file="types/trajectory.py",
        old="return self in (StopReason.TERMINATED, StopReason.ANSWERED)",
        new="return self in (StopReason.TERMINATED, StopReason.ANSWERED, StopReason.MAX_TURNS)",
        tests=("tests/rollout/test_episode.py::test_turns_ran_out_after_a_tool_call_is_truncation",),
    ),
    Mutation(
        name="tools_run_after_the_end",
        why="parallel calls go on after the one that ended the episode",
        file="rollout/episode.py",
        old="len(calls) - number - 1)\n                return stop\n",
        new="len(calls) - number - 1)\n",
        tests=("tests/rollout/test_episode.py::test_after_the_end_no_tool_runs_parallel_calls_included",),
    ),
    Mutation(
        name="steps_paid_twice",
        why="what steps pay is added to the reward a second time",
        file="rollout/record.py",
        old="turn.reward = (turn.reward or 0.0) + step.reward",
        new="turn.reward = (turn.reward or 0.0) + 2 * step.reward",
        tests=("tests/rollout/test_episode.py::test_tools_then_a_step_that_terminates",),
    ),
    Mutation(
        name="reward_weights_ignored",
        why="a reward that counts a tenth counts whole",
        file="types/trajectory.py",
        old="reward.weight * reward.value for reward",
        new="reward.value for reward",
        tests=("tests/rollout/test_episode.py::test_rewards_are_weighted_and_named",),
    ),
    Mutation(
        name="cancelled_episodes_finished",
        why="an episode that was cut off by the end of the process is never played again",
        file="rollout/group.py",
        old="return {one.id: one for one in self.finished if one.stop_reason is not StopReason.CANCELLED}",
        new="return {one.id: one for one in self.finished}",
        tests=("tests/rollout/test_group.py::test_a_cancelled_sibling_on_disk_is_played_again",),
    ),
    # -- learning ----------------------------------------------------------------------------------------
    Mutation(
        name="denominator_per_row",
        why="each row is divided by its own tokens, whatever normalisation was asked for",
        file="learn/normalise.py",
        old="            weight = 1 / tokens[part]\n",
        new="            weight = 1 / own / len(samples)\n",
        tests=("tests/learn/test_normalise.py::test_token",),
    ),
    Mutation(
        name="skipped_updates_do_not_count",
        why="the schedule falls behind whenever an update has nothing to learn from",
        file="learn/learner.py",
        old='call optim_step"\n        self.step += 1\n',
        new='call optim_step"\n',
        tests=(
            "tests/pipeline/test_long_runs.py::test_the_schedule_ends_with_the_stage_also_where_steps_had_nothing_to_learn",
        ),
    ),
    Mutation(
        name="gradients_left_over",
        why="an update's gradients are still there in the next one",
        file="learn/optim.py",
        old="            parameter.grad = None\n",
        new="            pass\n",
        tests=("tests/learn/test_learner.py::test_a_loaded_checkpoint_makes_the_same_next_update",),
    ),
    Mutation(
        name="learning_rate_never_warmed",
        why="the first updates are made at the full rate",
        file="learn/optim.py",
        old="return (step + 1) / config.warmup_steps",
        new="return 1.0",
        tests=("tests/learn/test_optim.py::test_schedules",),
    ),
    Mutation(
        name="optimizer_state_not_restored",
        why="a resumed run starts with empty moments",
        file="learn/optim.py",
        old='optimizer.load_state_dict({"state": state["parts"][name], "param_groups": groups})',
        new='optimizer.load_state_dict({"state": {}, "param_groups": groups})',
        tests=("tests/learn/test_learner.py::test_a_loaded_checkpoint_makes_the_same_next_update",),
    ),
    Mutation(
        name="evaluation_on_training_tasks",
        why="held-out scores are of what was trained on",
        file="pipeline/evaluate.py",
        old='run.tasks(env, config.split, "evaluate")',
        new='run.tasks(env, "train", "evaluate")',
        tests=("tests/pipeline/test_attempts.py::test_an_outage_does_not_stay_in_an_evaluation",),
    ),
)
