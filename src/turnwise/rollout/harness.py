"""The harness: what renders, parses, limits and scores. Equal hashes may be compared with each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields

from turnwise.config import LimitsConfig
from turnwise.envs.session import Limits

RULES = 3
"""Raised when the code changes what ends an episode, what a policy is told, or how rewards are added up."""


def harness_hash(
    *,
    renderer: str,
    environment: str,
    limits: Limits,
    rewards: Mapping[str, float] | None = None,
    forfeit: float = 0.0,
) -> str:
    """A short hex digest that is on every trajectory.

    Sampling settings are not in it: they are stored beside it, and greedy and sampled play share a harness.

    Args:
        renderer: The renderer's fingerprint; empty where nothing is rendered.
        environment: The environment's fingerprint.
        limits: After the recipe's were laid over the environment's.
        rewards: Weight of every reward by its identity, the environment's own under ``environment``.
        forfeit: What an end is worth that cannot be scored.
    """
    parts = [RULES, renderer, environment, asdict(limits), dict(rewards or {}), forfeit]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def overlay_limits(own: Limits, recipe: LimitsConfig) -> Limits:
    """The environment's own limits with those that the recipe sets laid over them."""
    chosen = {field.name: getattr(recipe, field.name) for field in fields(Limits)}
    return Limits(**{name: getattr(own, name) if value is None else value for name, value in chosen.items()})
