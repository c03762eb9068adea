"""Of the store: what a crash leaves behind."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="torn_line_not_cut",
        why="the first record after a crash is glued to half of another",
        file="journal.py",
        old="            os.ftruncate(fd, whole)\n            logger",
        new="            logger",
        tests=("tests/test_store.py::test_cut_at_every_byte",),
    ),
    Mutation(
        name="torn_line_read",
        why="half a record is read as a whole one",
        file="journal.py",
        old='                    if line.endswith(b"\\n"):\n',
        new="                    if line:\n",
        tests=("tests/test_store.py::test_cut_at_every_byte",),
    ),
    Mutation(
        name="stored_twice",
        why="an episode is learned from twice",
        file="store.py",
        old="if trajectory.id in known:",
        new="if trajectory.id in ():",
        tests=("tests/test_store.py::test_an_id_is_stored_once",),
    ),
    Mutation(
        name="steps_not_flushed_after_their_episodes",
        why="after a power loss a step speaks of episodes that are gone",
        file="store.py",
        old="        self._flush()\n        journal = self._writer",
        new="        journal = self._writer",
        tests=("tests/test_store.py::test_what_is_spoken_of_was_flushed_before",),
    ),
    Mutation(
        name="latest_checkpoint_by_name",
        why="step 9 is taken for later than step 10",
        file="checkpoints.py",
        old="key=lambda checkpoint: checkpoint.step)",
        new="key=lambda checkpoint: str(checkpoint.step))",
        tests=("tests/test_store.py::test_checkpoints",),
    ),
)
