"""Ways to run an environment's server: a process, a Docker container, a Hugging Face Space.

Each is a provider as OpenEnv has them: it starts one server, says its URL, waits until it is ready, stops it.
Whatever was started ends with this process, also when that is killed (`turnwise.openenv.run.guard`).
"""

from turnwise.openenv.run.docker import LocalDockerProvider
from turnwise.openenv.run.process import ProcessProvider
from turnwise.openenv.run.ready import StartError, StartTimeoutError
from turnwise.openenv.run.space import SpaceProvider, space_url

__all__ = [
    "LocalDockerProvider",
    "ProcessProvider",
    "SpaceProvider",
    "StartError",
    "StartTimeoutError",
    "space_url",
]
