"""The files around an environment that make its folder an OpenEnv package, as `openenv validate` has it.

The environment itself is a `turnwise.envs.base.Env` in ``environment.py``; what is here serves it, calls it
and describes it to Docker, to uv and to a Hugging Face Space.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from turnwise.openenv.run.space import find_uv
from turnwise.openenv.vendor import NAME, wheel

LEFT_OUT = ("openenv-core", "peft", "safetensors", "tokenizers", "torch", "transformers")
"""Of what Turnwise and the package require, what neither a server nor `turnwise env` ever imports."""
LOCK_SECONDS = 120.0
LOG_CHARS = 1000

INIT = '''"""{title}: a Turnwise environment and its OpenEnv client."""

from .client import {class_name}Env
from .environment import {class_name}
from .models import {class_name}Action, {class_name}Observation

__all__ = ["{class_name}", "{class_name}Action", "{class_name}Env", "{class_name}Observation"]
'''

CLIENT = '''"""A client of the server, wherever it runs.

    with {class_name}Env("http://127.0.0.1:8000").sync() as env:
        print(env.reset(seed=3).observation.text)
        print(env.call_tool("price", item="tea"))
"""

from __future__ import annotations

from typing import Any

from turnwise.openenv import MCPToolClient, StepResult

try:
    from .models import {class_name}Observation
except ImportError:  # run from this folder, without being installed
    from models import {class_name}Observation


class {class_name}Env(MCPToolClient):
    """Resets, lists the tools and calls them; every call is a step of the episode."""

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Any]:
        if "text" not in payload["observation"]:
            return super()._parse_result(payload)  # a tool's answer
        done, reward = payload["done"], payload["reward"]
        observation = {class_name}Observation(**payload["observation"], done=done, reward=reward)
        return StepResult(observation=observation, reward=reward, done=done)
'''

MODELS = '''"""What goes over the wire: a tool call, its answer, and what the policy is told."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from turnwise.openenv import CallToolAction, Observation

{class_name}Action = CallToolAction


class {class_name}Observation(Observation):
    """What a reset, or a reply without a tool call, is answered with."""

    text: str
    """What the policy sees."""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    """The same as messages of a conversation."""
'''

APP = '''"""The environment as a server: `python -m server.app`, or `uvicorn server.app:app`."""

from __future__ import annotations

import argparse

import uvicorn

from turnwise.openenv.hosted import hosted
from turnwise.openenv.server.app import create_server_app, uvicorn_config
from turnwise.openenv.server.settings import Settings, asked_for

try:
    from ..environment import {class_name}
except ImportError:  # run from the package's folder, without being installed
    from environment import {class_name}

app = create_server_app(
    hosted({class_name}),
    settings=Settings(token=asked_for()),  # TURNWISE_TOKEN; without one everybody may play
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve {title}.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    uvicorn.Server(uvicorn_config(app, host=given.host, port=given.port)).run()


if __name__ == "__main__":
    main()
'''

DOCKERFILE = """\
# docker build -t {name}-env -f server/Dockerfile .
FROM python:3.11-slim

# Spaces run containers as user 1000, whose home in the image, /home/user, is where it may write.
RUN pip install --no-cache-dir uv && useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/{name}
COPY --chown=user . .
RUN uv sync --no-dev --no-cache
ENV PATH="/home/user/{name}/.venv/bin:$PATH"
# In a Space the proxy alone reaches this container; its word that a request came by https is taken.
ENV FORWARDED_ALLOW_IPS=*

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD \\
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["python", "-m", "server.app", "--host", "0.0.0.0"]
"""

PYPROJECT = """\
[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "openenv-{dashed}"
version = "0.1.0"
description = "{title}, an environment for Turnwise and OpenEnv"
requires-python = ">=3.11"
dependencies = [
  "openenv-core>=0.3.0",  # `openenv validate` asks for it; nothing here imports it
  "{requirement}",
]

[dependency-groups]
dev = ["pytest>=8"]

[project.scripts]
server = "{name}.server.app:main"

[tool.setuptools]
packages = ["{name}", "{name}.server"]
package-dir = {{ "{name}" = ".", "{name}.server" = "server" }}

[tool.uv]
# A server trains nothing: what Turnwise needs for that alone is left out.
override-dependencies = [
{overrides}
]
{source}"""

REQUIREMENTS = """\
# What serving needs of Turnwise, for pip, which can leave out nothing of what training needs:
#     pip install --no-deps {turnwise} . && pip install -r server/requirements.txt
fastapi>=0.115,<1
httptools>=0.6.3,<1
httpx>=0.27,<1
huggingface-hub>=1.0,<2
jinja2>=3.1,<4
numpy>=1.26,<3
orjson>=3.10,<4
pydantic>=2.9,<3
pyyaml>=6,<7
rich>=13.9,<16
typer>=0.15,<1
uvicorn>=0.53,<1
uvloop>=0.21,<1; sys_platform != 'win32'
websockets>=15,<18
"""

README = """\
---
title: {title}
emoji: 🧺
colorFrom: blue
colorTo: green
sdk: docker
app_port: 8000
base_path: /web
pinned: false
tags:
  - openenv
  - turnwise
---

# {title}

A Turnwise environment that speaks [OpenEnv](https://pypi.org/project/openenv-core/).

    uv sync                                    # a .venv with what serving needs: no torch, no transformers
    source .venv/bin/activate
    turnwise env check environment.py:{class_name}     # what would spoil a training run
    turnwise env play environment.py:{class_name}      # by hand, in the terminal
    python -m server.app                       # http://127.0.0.1:8000, its page at /web
    turnwise env validate .                    # what others would see of the server
    turnwise env push . --repo-id ORG/{name}   # as a Hugging Face Space

Without uv, in a virtual environment, this installs as little:

    pip install --no-deps {turnwise} . && pip install -r server/requirements.txt

`{pip_all}` brings all that training needs too. `uv lock` keeps `uv.lock` true to
`pyproject.toml`; `openenv validate` asks for that file.
{vendored}
Train on it as `env: environment.py:{class_name}` or, from another machine, by its address:
`env: https://ORG-{dashed}.hf.space`. Or play on it:

```python
from {name} import {class_name}Env

with {class_name}Env("http://127.0.0.1:8000").sync() as env:
    print(env.reset(seed=3).observation.text)
    print(env.call_tool("price", item="tea"))
```

Everybody may play on a public Space; set its secret `TURNWISE_TOKEN`, and only who sends it may.
"""

MANIFEST = """\
spec_version: 1
name: {name}
type: space
runtime: fastapi
app: server.app:app
port: 8000
"""

SERVER_INIT = '"""Serves the environment."""\n'
DOCKERIGNORE = ".git\n.venv\n**/__pycache__\ntests\n"

FILES = {
    "__init__.py": INIT,
    "client.py": CLIENT,
    "models.py": MODELS,
    "server/__init__.py": SERVER_INIT,
    "server/app.py": APP,
    "server/Dockerfile": DOCKERFILE,
    "openenv.yaml": MANIFEST,
    "pyproject.toml": PYPROJECT,
    "server/requirements.txt": REQUIREMENTS,
    "README.md": README,
    ".dockerignore": DOCKERIGNORE,
}
"""Path in the package → template."""


VENDORED = """
`{path}` is the Turnwise that this package was made with. It stands here as no index
has it: `turnwise` on PyPI is another project. Where it can be had from a repository, write
`turnwise @ git+https://…` into `pyproject.toml`, and remove `[tool.uv.sources]` and `vendor/`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where others get the Turnwise that runs here."""

    requirement: str
    """As ``pyproject.toml`` has it; never the bare name, which PyPI gave to another project."""
    install: str
    """As a shell's command line has it for pip, in the package's folder."""
    path: str | None = None
    """The wheel's in the package, where it is carried along."""
    data: bytes = b""
    """The wheel."""


def package_files(name: str, class_name: str) -> dict[str, bytes]:
    """Path → contents of what stands around ``environment.py``.

    Args:
        name: The package's, in snake_case: ``web_shop``.
        class_name: The environment's: ``WebShop``.

    Raises:
        EnvSpecError: As for `turnwise.openenv.vendor.wheel`.
    """
    title = name.replace("_", " ").capitalize()
    found = origin(_direct_url())
    carried = found.path is not None
    words = {
        "name": name,
        "class_name": class_name,
        "title": title,
        "dashed": name.replace("_", "-"),
        "requirement": found.requirement,
        "turnwise": found.install,
        "source": f'\n[tool.uv.sources]\n{NAME} = {{ path = "{found.path}" }}\n' if carried else "",
        "pip_all": "pip install --find-links vendor ." if carried else "pip install .",
        "vendored": VENDORED.format(path=found.path) if carried else "",
        "overrides": "\n".join(f"  \"{one}; python_version < '0'\"," for one in LEFT_OUT),
    }
    texts = {path: template.format(**words).encode() for path, template in FILES.items()}
    return texts | ({found.path: found.data} if found.path is not None else {})


def origin(direct_url: str | None) -> Origin:
    """Where others get this Turnwise: from where it came, if they find it there too, else with the package.

    Args:
        direct_url: What ``direct_url.json`` of the installed one says (PEP 610); None is from an index, which
            need not be others'.

    Raises:
        EnvSpecError: As for `turnwise.openenv.vendor.wheel`.
    """
    said = json.loads(direct_url or "{}")
    url, vcs = said.get("url", ""), said.get("vcs_info")
    if url.startswith("https://"):
        at = f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
        return Origin(requirement=f"{NAME} @ {at}", install=f"'{NAME} @ {at}'")
    made = wheel()
    path = f"vendor/{made.filename}"
    return Origin(requirement=f"{NAME}=={made.version}", install=path, path=path, data=made.data)


def _direct_url() -> str | None:
    try:
        return distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return None


def lock(folder: Path) -> str | None:
    """Have uv write ``uv.lock``; what kept it from that, None where it did."""
    if (uv := find_uv()) is None:
        return "uv is not installed (`pip install uv`)"
    command = [uv, "lock", "--directory", str(folder), "--python", sys.executable]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LOCK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"`uv lock` took over {LOCK_SECONDS:g} s"
    return None if done.returncode == 0 else f"`uv lock` failed:\n{done.stderr[-LOG_CHARS:].strip()}"
