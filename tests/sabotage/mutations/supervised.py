"""Of supervised learning: where the loss falls, what an update takes; and what leaves the machine."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

SFT = "tests/compat/test_sft.py"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="loss_on_prompts",
        why="the policy learns to ask the questions",
        file="compat/lessons.py",
        old="start = 0 if self._completion_only is False else common_length(prompt, whole)",
        new="start = 0",
        tests=(f"{SFT}::test_the_completion_alone_is_learned_from",),
    ),
    Mutation(
        name="loss_on_what_the_assistant_said_in_the_prompt",
        why="replies of the prompt, which others gave, are learned from too",
        file="compat/lessons.py",
        old="before = prompt if self._completion_only is not False else []",
        new="before = []",
        tests=(f"{SFT}::test_of_completions_the_assistants_words_in_them",),
    ),
    Mutation(
        name="loss_on_the_first_token",
        why="it follows nothing, and would be scored by what another row left there",
        file="compat/lessons.py",
        old="        loss_T[:1] = False\n",
        new="",
        tests=(f"{SFT}::test_the_first_token_follows_nothing_and_is_only_read",),
    ),
    Mutation(
        name="the_start_is_cut",
        why="of a long conversation its end is lost, or its beginning, whichever was to stay",
        file="compat/lessons.py",
        old="slice(-most, None) if end else slice(None, most)",
        new="slice(None, most) if end else slice(-most, None)",
        tests=(f"{SFT}::test_what_is_too_long_keeps_its_start_or_its_end",),
    ),
    Mutation(
        name="bfd_splits",
        why="conversations begin in their middle",
        file="compat/lessons.py",
        old='stop = most if strategy == "bfd" else None',
        new="stop = None",
        tests=(f"{SFT}::test_packing_fills_the_fullest_row",),
    ),
    Mutation(
        name="each_pass_in_the_same_order",
        why="a batch is made of the same rows in every pass",
        file="compat/course.py",
        old="manual_seed(self._seed + epoch)",
        new="manual_seed(self._seed)",
        tests=(f"{SFT}::test_an_epochs_last_update_takes_what_is_left",),
    ),
    Mutation(
        name="rows_left_out_of_each_pass",
        why="an update is always whole, and the same few rows are never learned from",
        file="compat/course.py",
        old="return math.ceil(self.micro_batches / self._accumulated)",
        new="return max(1, self.micro_batches // self._accumulated)",
        tests=(f"{SFT}::test_an_epochs_last_update_takes_what_is_left",),
    ),
    Mutation(
        name="a_push_makes_a_space",
        why="a run that was to stay here is on the Hub with its model",
        file="compat/trackers.py",
        old="        if args.trackio_static_space_id:\n            super().on_push_begin",
        new="        if True:\n            super().on_push_begin",
        tests=("tests/compat/test_trackers.py::test_pushing_a_model_makes_no_space",),
    ),
)
