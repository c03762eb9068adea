"""The mutations: one line each, of the kind that leaves a run looking well.

Each names the tests that must fail, so that a guard that was lost is noticed and not made up for by chance.
"""

from __future__ import annotations

from tests.sabotage.mutation import Mutation
from tests.sabotage.mutations import (
    chat,
    compat,
    credit,
    engines,
    images,
    learner,
    losses,
    mcp,
    openenv_client,
    openenv_run,
    openenv_server,
    parallel,
    pipeline,
    rollout,
    store,
    supervised,
    trainer,
    vllm,
)

MUTATIONS: tuple[Mutation, ...] = (
    *chat.MUTATIONS,
    *engines.MUTATIONS,
    *rollout.MUTATIONS,
    *compat.MUTATIONS,
    *credit.MUTATIONS,
    *losses.MUTATIONS,
    *mcp.MUTATIONS,
    *openenv_client.MUTATIONS,
    *openenv_run.MUTATIONS,
    *openenv_server.MUTATIONS,
    *learner.MUTATIONS,
    *parallel.MUTATIONS,
    *pipeline.MUTATIONS,
    *store.MUTATIONS,
    *images.MUTATIONS,
    *supervised.MUTATIONS,
    *trainer.MUTATIONS,
    *vllm.MUTATIONS,
)
