"""OpenEnv's protocol, both ways: any environment as a server, any server as an environment.

    from turnwise.openenv import Action, Environment, Observation, State      # in place of openenv.core
    from turnwise.openenv import EnvClient, MCPToolClient, StepResult, create_app

Nothing here needs ``openenv-core``. `turnwise.openenv.served` says what a server hosts,
`turnwise.openenv.server` serves it, `turnwise.openenv.client` plays on servers, whoever wrote them. Names are
imported when they are first used: a client needs no server.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turnwise.openenv.client.env_client import EnvClient
    from turnwise.openenv.client.generic import GenericAction, GenericEnvClient
    from turnwise.openenv.client.mcp_client import MCPToolClient
    from turnwise.openenv.client.sync import SyncEnvClient
    from turnwise.openenv.environment import (
        CompositeTransform,
        Environment,
        MCPEnvironment,
        ModelTokenizer,
        NullTransform,
        Transform,
        load_environment_metadata,
    )
    from turnwise.openenv.models import (
        Action,
        CallToolAction,
        CallToolObservation,
        CodeExecResult,
        ConcurrencyConfig,
        EnvironmentMetadata,
        ListToolsAction,
        ListToolsObservation,
        Message,
        Observation,
        State,
        StepResult,
        Tool,
        ToolError,
        ToolErrorType,
        serialize_observation,
    )
    from turnwise.openenv.rubric import ExponentialDiscountingTrajectoryRubric, Rubric, TrajectoryRubric
    from turnwise.openenv.run.docker import LocalDockerProvider
    from turnwise.openenv.run.process import ProcessProvider
    from turnwise.openenv.run.provider import ContainerProvider
    from turnwise.openenv.run.space import SpaceProvider
    from turnwise.openenv.server.create import HTTPEnvServer, create_app, create_fastapi_app

WHERE = {
    "client.env_client": ("EnvClient",),
    "client.generic": ("GenericAction", "GenericEnvClient"),
    "client.mcp_client": ("MCPToolClient",),
    "client.sync": ("SyncEnvClient",),
    "environment": (
        *("CompositeTransform", "Environment", "MCPEnvironment", "ModelTokenizer", "NullTransform"),
        *("Transform", "load_environment_metadata"),
    ),
    "models": (
        *("Action", "CallToolAction", "CallToolObservation", "CodeExecResult", "ConcurrencyConfig"),
        *("EnvironmentMetadata", "serialize_observation"),
        *("ListToolsAction", "ListToolsObservation", "Message", "Observation", "State", "StepResult"),
        *("Tool", "ToolError", "ToolErrorType"),
    ),
    "run.docker": ("LocalDockerProvider",),
    "rubric": ("ExponentialDiscountingTrajectoryRubric", "Rubric", "TrajectoryRubric"),
    "run.process": ("ProcessProvider",),
    "run.provider": ("ContainerProvider",),
    "run.space": ("SpaceProvider",),
    "server.create": ("HTTPEnvServer", "create_app", "create_fastapi_app"),
}
"""Module → what of it is here."""
__all__ = [
    "Action",
    "CallToolAction",
    "CallToolObservation",
    "CodeExecResult",
    "CompositeTransform",
    "ConcurrencyConfig",
    "ContainerProvider",
    "EnvClient",
    "Environment",
    "EnvironmentMetadata",
    "ExponentialDiscountingTrajectoryRubric",
    "GenericAction",
    "GenericEnvClient",
    "HTTPEnvServer",
    "ListToolsAction",
    "ListToolsObservation",
    "LocalDockerProvider",
    "MCPEnvironment",
    "MCPToolClient",
    "Message",
    "ModelTokenizer",
    "NullTransform",
    "Observation",
    "ProcessProvider",
    "Rubric",
    "SpaceProvider",
    "State",
    "StepResult",
    "SyncEnvClient",
    "Tool",
    "ToolError",
    "ToolErrorType",
    "TrajectoryRubric",
    "Transform",
    "create_app",
    "create_fastapi_app",
    "load_environment_metadata",
    "serialize_observation",
]


def __getattr__(name: str) -> Any:
    for module, names in WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"turnwise.openenv.{module}"), name)
    raise AttributeError(f"module 'turnwise.openenv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
