"""Of servers that are started and looked at: what must end, what must stay here, what must be seen."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

CLIENT = "tests/openenv/test_env_client.py::"
RUN = "tests/openenv/test_run.py::"
PUSH = "tests/openenv/test_push.py::"
VALIDATE = "tests/openenv/test_validate.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="reset_behind_a_reply_that_is_late",
        why="a typed client's next episode waits for a call that hangs",
        file="openenv/client/env_client.py",
        old="        if self._socket is not None and not self._socket.usable:\n",
        new="        if self._socket is not None and not self._socket.is_open:\n",
        tests=(CLIENT + "test_a_late_reply_never_answers_another_call",),
    ),
    Mutation(
        name="started_and_forgotten",
        why="a cancelled start leaves its server running",
        file="openenv/run/launch.py",
        old="                await asyncio.shield(asyncio.to_thread(stop, provider))\n",
        new="                pass\n",
        tests=(CLIENT + "test_a_start_that_fails_or_is_given_up_leaves_nothing",),
    ),
    Mutation(
        name="container_of_a_dead_process",
        why="a killed run leaves its containers",
        file="openenv/run/docker.py",
        old='            self._guard = Guard([executable, "rm", "--force", "--volumes", name])\n',
        new="",
        tests=(RUN + "test_the_container_goes_when_this_process_is_killed",),
    ),
    Mutation(
        name="container_that_could_not_start",
        why="each failed start leaves a container behind",
        file="openenv/run/docker.py",
        old="            self._give_up(error)\n            raise\n\n    def wait_for_ready",
        new="            raise\n\n    def wait_for_ready",
        tests=(RUN + "test_a_failed_start_says_why_and_leaves_nothing",),
    ),
    Mutation(
        name="secrets_on_the_command_line",
        why="whoever lists processes reads the keys that a container is given",
        file="openenv/run/docker.py",
        old='            flags += ["--env", key]\n',
        new='            flags += ["--env", f"{key}={value}"]\n',
        tests=(RUN + "test_values_of_the_environment_are_not_on_the_command_line",),
    ),
    Mutation(
        name="hidden_files_are_published",
        why="a .env with keys is uploaded to a public Space",
        file="openenv/push.py",
        old="    return hidden or by_name or",
        new="    return by_name or",
        tests=(PUSH + "test_a_package_becomes_a_space",),
    ),
    Mutation(
        name="error_frames_are_compared",
        why="a server on which no step was ever taken is said to repeat its seeds",
        file="openenv/validate/behaviour.py",
        old="    return repeats and acted\n",
        new="    return repeats\n",
        tests=(VALIDATE + "test_an_environment_that_raises_is_an_error_and_nothing_is_said_of_its_seeds",),
    ),
    Mutation(
        name="a_package_asks_for_a_bare_turnwise",
        why="who installs a new package runs what a stranger has published under the name",
        file="openenv/scaffold.py",
        old='requirement=f"{NAME}=={made.version}"',
        new="requirement=NAME",
        tests=("tests/openenv/test_scaffold.py::test_the_package_asks_for_the_turnwise_that_wrote_it",),
    ),
    Mutation(
        name="pip_installs_what_is_overridden",
        why="a Space without uv brings what trains, or another Turnwise than the one it carries",
        file="openenv/run/space.py",
        old="        if alone is None:\n",
        new="        if True:\n",
        tests=("tests/openenv/test_space.py::test_what_a_package_overrides_is_not_installed",),
    ),
    Mutation(
        name="seeds_are_not_compared",
        why="a server whose siblings start from different states is called fit to train on",
        file="openenv/validate/behaviour.py",
        old="    repeats = fresh == alone[0]\n",
        new="    repeats = len(fresh) == len(alone[0])\n",
        tests=(VALIDATE + "test_each_fault_is_named",),
    ),
    Mutation(
        name="sessions_are_not_compared",
        why="a server whose sessions share their state is called fit to train on",
        file="openenv/validate/behaviour.py",
        old="            if await player.episode(socket, seed, steps=STEPS) != episode:\n",
        new="            if len(await player.episode(socket, seed, steps=STEPS)) != len(episode):\n",
        tests=(VALIDATE + "test_each_fault_is_named",),
    ),
)
