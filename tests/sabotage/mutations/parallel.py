"""Mutations of what several processes do together."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

_ONE = "tests/learn/test_parallel.py::test_an_update_is_that_of_one_process"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="gradients_not_summed",
        why="each process trains a model of its own, on its share",
        file="learn/parallel.py",
        old="if self._pending and not self.model.sharded:",
        new="if False:",
        tests=(f"{_ONE}[ddp-2-adamw]",),
    ),
    Mutation(
        name="gradients_averaged_over_processes",
        why="more processes learn less from the same samples",
        file="learn/shards.py",
        old="part.set_gradient_divide_factor(1.0)",
        new="part.set_gradient_divide_factor(float(mesh.size()))",
        tests=(f"{_ONE}[fsdp-2-adamw]",),
    ),
    Mutation(
        name="dropout_by_process",
        why="adapters drop other inputs in a run of more processes",
        file="learn/parallel.py",
        old="own = super()._backward(batches[ranks.rank :: ranks.count], loss, entropy_gradient, accuracy)",
        new="mine = [batch for _, batch in batches[ranks.rank :: ranks.count]]\n"
        "            own = super()._backward(list(enumerate(mine)), loss, entropy_gradient, accuracy)",
        tests=(f"{_ONE}[ddp-2-lora, dropout, kl and entropy]",),
    ),
    Mutation(
        name="matrices_orthogonalised_in_parts",
        why="Muon sees a part of each matrix",
        file="learn/optim.py",
        old="parameter.grad = replicate(parameter.grad)",
        new="pass",
        tests=(f"{_ONE}[fsdp-2-muon]",),
    ),
    Mutation(
        name="tower_gathered_by_layer",
        why="a process whose rows show no image takes no part in gathering the vision tower",
        file="learn/model.py",
        old="together=model._sight.tower",
        new="together=None",
        tests=("tests/learn/test_parallel_vision.py::test_updates_are_those_of_one_process[fsdp-qwen3_vl]",),
    ),
    Mutation(
        name="tower_without_gradients_where_nothing_is_shown",
        why="gradients of the vision tower are summed by some of the processes",
        file="learn/model.py",
        old="if self.shows_images and not shown:",
        new="if False:",
        tests=("tests/learn/test_parallel_vision.py::test_updates_are_those_of_one_process[fsdp-qwen3_vl]",),
    ),
    Mutation(
        name="errors_of_others_unheard",
        why="a process that could not do its share is not noticed",
        file="learn/ranks.py",
        old="if len({failure for failure, _ in told}) > 1:",
        new="if False:",
        tests=(
            "tests/learn/test_parallel.py::test_an_error_in_one_process_is_told_by_the_first_and_ends_the_others"
            "[ddp, ours]",
        ),
    ),
)
