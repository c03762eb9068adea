"""Mutations of what keeps a run's tokens its own on servers that others use too."""

from __future__ import annotations

from tests.sabotage.mutation import Mutation

_LOST = "tests/engines/test_vllm_lost.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="strangers_weights_believed",
        why="tokens that another trainer's base drew count as this run's",
        file="engines/vllm_tenancy.py",
        old="if label != self._bases[server]:",
        new="if False:",
        tests=(f"{_LOST}test_a_server_that_lost_its_base_is_found_out",),
    ),
    Mutation(
        name="kv_of_older_weights_kept",
        why="held requests go on from KV of the weights before",
        file="engines/vllm_tenancy.py",
        old="            await server.forget_kv()\n",
        new="",
        tests=(f"{_LOST}test_held_requests_are_computed_again",),
    ),
    Mutation(
        name="servers_left_behind_are_asked",
        why="a server that missed the present weights plays on with older ones",
        file="engines/vllm_placement.py",
        old="return [server for server in self._servers if server not in self.behind]",
        new="return self._servers",
        tests=(f"{_LOST}test_a_server_that_was_started_anew_draws_no_new_sessions[file]",),
    ),
)
