"""Of engines: keys and values, draws, and which weights made them."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
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
        name="weights_never_copied",
        why="the engine plays on with the first weights under ever new versions",
        file="engines/core.py",
        old="        refresh(self._model, source)\n",
        new="",
        tests=("tests/engines/test_versions.py::test_new_weights_answer_and_the_given_model_is_untouched",),
    ),
    Mutation(
        name="top_p_of_the_whole",
        why="top-p keeps more than it says where top-k cut before it",
        file="engines/sampling.py",
        old="top_p * left.sum(-1, keepdim=True, dtype=torch.float64)",
        new="top_p * ordered.sum(-1, keepdim=True, dtype=torch.float64)",
        tests=("tests/engines/test_sampling.py::test_cuts_logprobs_and_kept_mass_equal_the_reference",),
    ),
    Mutation(
        name="top_p_without_the_token_that_crosses",
        why="top-p keeps less than it says",
        file="engines/sampling.py",
        old="before = left.cumsum(-1, dtype=torch.float64) - left",
        new="before = left.cumsum(-1, dtype=torch.float64)",
        tests=("tests/engines/test_sampling.py::test_cuts_logprobs_and_kept_mass_equal_the_reference",),
    ),
    Mutation(
        name="fused_weights_not_refreshed",
        why="half of the network plays with the old weights",
        file="engines/core.py",
        old="        self._forward.refresh()\n",
        new="",
        tests=("tests/engines/test_versions.py::test_new_weights_answer_and_the_given_model_is_untouched",),
    ),
    Mutation(
        name="engine_keeps_its_version",
        why="every token is labelled with version 0",
        file="engines/core.py",
        old="        self.version = version\n",
        new="",
        tests=("tests/engines/test_versions.py::test_new_weights_answer_and_the_given_model_is_untouched",),
    ),
    Mutation(
        name="settings_of_another_request",
        why="a row is drawn with the temperature and the seed of whoever was there before",
        file="engines/core.py",
        old=(
            "self._draws is None or self._drawn_at != table.changes or not np.array_equal(slots, "
            "self._drawing)"
        ),
        new="self._draws is None or not np.array_equal(slots, self._drawing)",
        tests=("tests/engines/test_sampling.py::test_a_seed_draws_the_same_whatever_else_runs",),
    ),
    Mutation(
        name="draws_go_on_from_the_turn_before",
        why="the same seed draws other tokens in a slot that was used before",
        file="engines/slots.py",
        old="        self.drawn[slot] = 0\n",
        new="",
        tests=("tests/engines/test_sampling.py::test_a_seed_draws_the_same_whatever_else_runs",),
    ),
    Mutation(
        name="moved_kv_left_behind",
        why="a sequence goes on from its neighbour's keys and values",
        file="engines/core.py",
        old=(
            "        self._cache.swap(last, hole, int(max(self._table.computed[last], "
            "self._table.computed[hole])))\n"
        ),
        new="",
        tests=("tests/engines/test_generate.py::test_mixed_lengths_at_once_equal_generate",),
    ),
    Mutation(
        name="kept_mass_before_the_cut",
        why="nobody can correct for what top-p cut",
        file="engines/request.py",
        old="            self.kept_mass.append(kept)",
        new="            self.kept_mass.append(1.0)",
        tests=("tests/engines/test_sampling.py::test_logprobs_and_kept_mass_of_replies",),
    ),
    Mutation(
        name="label_of_the_weights_before",
        why="tokens are labelled with the version before theirs",
        file="engines/core.py",
        old="finish = request.add(token, logprob, kept, self.version)",
        new="finish = request.add(token, logprob, kept, self.version - 1)",
        tests=("tests/engines/test_versions.py::test_new_weights_answer_and_the_given_model_is_untouched",),
    ),
    Mutation(
        name="vllm_versions_as_they_were_asked_for",
        why="tokens drawn after new weights arrived count as drawn by the old",
        file="engines/vllm_tenancy.py",
        old="        return found.version\n",
        new="        return requested\n",
        tests=("tests/engines/test_vllm.py::test_a_request_in_flight_goes_on_under_new_weights",),
    ),
    Mutation(
        name="vllm_goes_on_from_the_prompt",
        why="a reply that was moved to a new adapter forgets what it had said",
        file="engines/vllm.py",
        old="await self._draw([*prompt_ids, *ids], rest, session)",
        new="await self._draw(prompt_ids, rest, session)",
        tests=("tests/engines/test_vllm.py::test_adapters_of_several_runs_share_a_server_and_never_meet",),
    ),
    Mutation(
        name="vllm_repeats_its_draws",
        why="what is left of a moved reply is drawn with the numbers of its beginning",
        file="engines/vllm_answer.py",
        old="    if seed is None or drawn == 0:\n",
        new="    if True:\n",
        tests=("tests/engines/test_vllm.py::test_adapters_of_several_runs_share_a_server_and_never_meet",),
    ),
    Mutation(
        name="vllm_half_loaded_weights_count",
        why="tokens of weights of which some were replaced and some not are learned from",
        file="engines/vllm_tenancy.py",
        old="await server.set_label(str(Label(BROKEN, label.version)))",
        new="pass",
        tests=(
            "tests/engines/test_vllm.py::test_weights_that_break_off_spoil_no_sample_and_the_next_ones_heal",
        ),
    ),
    Mutation(
        name="vllm_probability_of_nothing",
        why="a token that the server has no probability of counts as impossible, not as an error",
        file="engines/vllm_answer.py",
        old="or logprob <= NO_LOGPROB",
        new="or logprob < NO_LOGPROB",
        tests=("tests/engines/test_vllm.py::test_what_cannot_be_learned_from_is_an_error",),
    ),
    Mutation(
        name="vllm_taken_weights_count",
        why="another run's weights draw this run's samples",
        file="engines/vllm_tenancy.py",
        old="if found is None or found.holder != self.holder:",
        new="if found is None:",
        tests=("tests/engines/test_vllm.py::test_full_weights_are_one_runs",),
    ),
)
