"""Of images: whose features stand where, and what is kept of them."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

ENGINE = "tests/engines/test_vision.py::"
LEARNER = "tests/learn/test_vision.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="kv_of_another_image",
        why="a prompt goes on from the KV of one that showed another image of the same size",
        file="engines/vision.py",
        old="= -1 - int(image.sha256[:15], 16)",
        new="= -1",
        tests=(ENGINE + "test_a_prompt_that_shows_another_image_shares_no_kv_behind_it",),
    ),
    Mutation(
        name="features_of_old_weights",
        why="images are seen with the vision tower of an older version",
        file="engines/core.py",
        old="            self._sight.forget()\n",
        new="            pass\n",
        tests=(ENGINE + "test_an_image_is_encoded_once_for_each_version_of_the_weights",),
    ),
    Mutation(
        name="replies_placed_as_if_images_were_text",
        why="the positions of what is sampled are not those that are learned",
        file="engines/request.py",
        old="return sum(max(one.grid[1:]) // self.merge - one.tokens for one in self.images)",
        new="return 0",
        tests=(ENGINE + "test_replies_over_several_turns_with_images_are_the_plain_module_s[cut-qwen3_vl]",),
    ),
    Mutation(
        name="images_begin_anew_in_each_step",
        why="an image that is cut by the end of a step is shown from its beginning again",
        file="engines/vision.py",
        old="image, first - image.start, last - image.start))",
        new="image, 0, last - first))",
        tests=(ENGINE + "test_replies_over_several_turns_with_images_are_the_plain_module_s[cut-qwen3_vl]",),
    ),
    Mutation(
        name="placeholder_sampled",
        why="the policy says an image's placeholder, and the next turn has no image for it",
        file="engines/core.py",
        old="        if self._muted is not None:\n",
        new="        if self._muted == -1:\n",
        tests=(ENGINE + "test_the_placeholder_is_never_said",),
    ),
    Mutation(
        name="placeholder_learned",
        why="the learner's probabilities count a token that is never sampled",
        file="learn/model.py",
        old="        if self._sight.muted is None:\n            return logits_NV\n",
        new="        return logits_NV\n",
        tests=(LEARNER + "test_logprobs_are_the_plain_module_s[packing0-qwen3_vl]",),
    ),
    Mutation(
        name="learned_with_text_positions",
        why="the learner reads images as a line of patches",
        file="learn/vision.py",
        old="            axes_4BT[1:, row, start:] = positions(length, placed, self.vision.merge)\n",
        new="",
        tests=(LEARNER + "test_logprobs_are_the_plain_module_s[packing0-qwen3_vl]",),
    ),
    Mutation(
        name="images_not_kept",
        why="a killed run cannot learn from what it has played",
        file="store.py",
        old="        self._images.keep(named_in(trajectory))\n",
        new="",
        tests=("tests/test_images.py::test_a_run_keeps_what_its_trajectories_name",),
    ),
    Mutation(
        name="dropped_images_unnoticed",
        why="a template leaves an image out, and placeholders belong to others",
        file="chat/template.py",
        old="        if token is not None and (found := text.count(token)) != wanted:",
        new="        if token is None and (found := text.count(str(token))) != wanted:",
        tests=("tests/chat/test_vision.py::test_images_that_are_not_written_are_refused",),
    ),
    Mutation(
        name="rows_without_their_images",
        why="the images of a data set's own column are not shown",
        file="envs/trl_class.py",
        old="returned, images_of(task))",
        new="returned)",
        tests=("tests/envs/test_images.py::test_a_row_s_images_are_shown_as_trl_shows_them",),
    ),
)
