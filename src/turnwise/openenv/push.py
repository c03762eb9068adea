"""An OpenEnv package as a Hugging Face Space, by one commit through ``huggingface_hub``.

    push(Path("shop"), "org/shop", secrets={"TURNWISE_TOKEN": "…"})

The Space builds the package's Dockerfile, which it wants at the top: ``server/Dockerfile`` is sent as
``Dockerfile``. Hidden files stay here, as they hold keys, and so do virtual environments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from turnwise.errors import EnvSpecError, TurnwiseError, boundary
from turnwise.openenv.run.process import manifest

LEFT_OUT = ("__pycache__", "*.pyc", "*.egg-info", "build", "dist", "outputs", "node_modules")
"""Names of files and folders that are never sent."""
SENT_THOUGH_HIDDEN = (".dockerignore", ".gitattributes")
REQUIRED = ("openenv.yaml", "README.md", "__init__.py", "client.py", "models.py", "pyproject.toml")
PORT = 8000


class PushError(TurnwiseError, RuntimeError):
    """The Hub did not take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A Space after a push."""

    repo_id: str
    """``org/name``."""
    url: str
    """Its page; of a pull request, the pull request's."""
    files: tuple[str, ...]
    """What was sent, by its path in the Space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A folder that can be a Space."""

    folder: Path
    """Where ``openenv.yaml`` is."""
    name: str
    """The environment's, from ``openenv.yaml``."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """For the Space, from ``openenv.yaml``."""


def package(folder: Path) -> Package:
    """Look whether a folder is an OpenEnv package that a Space can build.

    Raises:
        EnvSpecError: Something is missing, or the Space would not reach the server.
    """
    said = manifest(folder)
    missing = [name for name in REQUIRED if not (folder / name).exists()]
    if not dockerfile(folder).exists():
        missing.append("server/Dockerfile")
    if missing:
        raise EnvSpecError(
            f"{folder} is no OpenEnv package: {', '.join(missing)} missing; `turnwise env new NAME` has all"
        )
    name: Any = said.get("name")
    variables: Any = said.get("variables") or {}
    if not isinstance(name, str):
        raise EnvSpecError(f"{folder / 'openenv.yaml'} gives no name; write `name: my_env`")
    if not isinstance(variables, dict):
        raise EnvSpecError(
            f"{folder / 'openenv.yaml'}: variables is {variables!r}, not a mapping of KEY: value"
        )
    check_readme(folder / "README.md", port=said.get("port", PORT))
    return Package(
        folder=folder, name=name, variables={str(key): str(value) for key, value in variables.items()}
    )


def check_readme(path: Path, *, port: object) -> None:
    """Raises `EnvSpecError` if a README's front matter does not make a Space that reaches ``port``."""
    wanted = f"---\nsdk: docker\napp_port: {port}\nbase_path: /web\ntags:\n  - openenv\n---"
    opening, _, rest = path.read_text(encoding="utf-8").partition("---\n")
    front, closing, _ = rest.partition("\n---")
    if opening.strip() or not closing:
        raise EnvSpecError(
            f"{path} has no front matter, by which the Hub knows a Space; begin it with\n{wanted}"
        )
    try:
        space = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise EnvSpecError(f"{path}: the front matter is no YAML: {error}") from error
    found = space if isinstance(space, dict) else {}
    if found.get("sdk") != "docker" or found.get("app_port") != port:
        raise EnvSpecError(
            f"{path}: the front matter says sdk: {found.get('sdk')}, app_port: {found.get('app_port')}, and "
            f"the server listens on {port} in a container; write\n{wanted}"
        )


def files(folder: Path, exclude: Sequence[str] = ()) -> dict[str, Path]:
    """What is sent: path in the Space → file.

    Args:
        folder: The package.
        exclude: Further patterns of names, or of paths in the package.

    Raises:
        EnvSpecError: A link leads out of the package, or to what is not sent.
    """
    found = {}
    venvs = [path.parent for path in folder.rglob("pyvenv.cfg") if path.parent != folder]
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if left_out(inside, exclude) or any(path.is_relative_to(venv) for venv in venvs):
            continue
        if path.is_symlink():
            check_link(path, folder, exclude)
        if path.is_file():
            found[inside.as_posix()] = path
    where = dockerfile(folder)
    found.pop(where.relative_to(folder).as_posix(), None)
    return {"Dockerfile": where, **found}


def check_link(path: Path, folder: Path, exclude: Sequence[str]) -> None:
    """Raises `EnvSpecError` if a link is to anything but a file of the package that is sent."""
    target, root = path.resolve(), folder.resolve()
    own = target.is_relative_to(root) and not left_out(target.relative_to(root), exclude)
    if not (own and target.is_file()):
        raise EnvSpecError(
            f"{path} is a link to {target}, which is no file that is sent: put the file in its place, or "
            f"leave it here with --exclude {path.relative_to(folder).as_posix()}"
        )


def left_out(inside: Path, exclude: Sequence[str]) -> bool:
    """Whether a file of the package stays here."""
    hidden = (
        any(part.startswith(".") for part in inside.parts) and inside.as_posix() not in SENT_THOUGH_HIDDEN
    )
    paths = [inside.as_posix(), *(parent.as_posix() for parent in inside.parents)]
    by_name = any(fnmatch(part, pattern) for part in inside.parts for pattern in (*LEFT_OUT, *exclude))
    return hidden or by_name or any(fnmatch(path, pattern) for path in paths for pattern in exclude)


def dockerfile(folder: Path) -> Path:
    """Where a package's Dockerfile is, or should be."""
    top = folder / "Dockerfile"
    return top if top.exists() else folder / "server/Dockerfile"


def push(
    folder: Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    variables: Mapping[str, str] | None = None,
    secrets: Mapping[str, str] | None = None,
    hardware: str | None = None,
    exclude: Sequence[str] = (),
    pull_request: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Make the Space where there is none, set what it is given, and send the package.

    Args:
        folder: The package.
        repo_id: ``org/name``; a bare name is yours, None is yours and named as the environment.
        private: For a new Space; None is what the account has chosen.
        variables: Everybody sees them; over those of ``openenv.yaml``.
        secrets: Its server alone sees them.
        hardware: Such as ``t4-small``, for a new Space.
        exclude: Patterns of what is not sent.
        pull_request: Propose it to a Space that is there, whose settings stay.
        message: Of the commit.
        token: None is the one that ``hf auth login`` saved, or ``HF_TOKEN``.

    Raises:
        EnvSpecError: The folder is no package, or settings were given to a pull request.
        PushError: The Hub does not know you, or says no.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    found = package(folder)
    settings = {**({} if pull_request else found.variables), **(variables or {})}
    if pull_request and (variables or secrets or hardware or private is not None):
        raise EnvSpecError(
            "a pull request carries files alone: leave variables, secrets, hardware and private away, and "
            "set them in the Space"
        )
    api = HfApi(token=token)
    if repo_id is None or "/" not in repo_id:
        with told("who you are"):
            repo_id = f"{api.whoami()['name']}/{repo_id or found.name}"
    sent = files(folder, exclude)
    if not pull_request:
        more: dict[str, Any] = {} if hardware is None else {"space_hardware": hardware}
        with told(f"Space {repo_id}"):
            api.create_repo(
                repo_id, repo_type="space", space_sdk="docker", private=private, exist_ok=True, **more
            )
            for key, value in settings.items():
                api.add_space_variable(repo_id, key, value)
            for key, value in (secrets or {}).items():
                api.add_space_secret(repo_id, key, value)
    with told(f"files of Space {repo_id}"):
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=inside, path_or_fileobj=path) for inside, path in sent.items()],
            repo_type="space",
            commit_message=message or f"{found.name}, with turnwise env push",
            create_pr=pull_request,
        )
    url = commit.pr_url if pull_request and commit.pr_url else f"{api.endpoint}/spaces/{repo_id}"
    return Pushed(repo_id=repo_id, url=url, files=tuple(sent))


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what the Hub says into a `PushError` that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    advice = "`hf auth login`, or HF_TOKEN, with a token that may write"
    try:
        with boundary(PushError, what):
            yield
    except PushError as error:
        cause = error.__cause__
        status = getattr(cause.response, "status_code", None) if isinstance(cause, HfHubHTTPError) else None
        if status in (401, 403) or isinstance(cause, LocalTokenNotFoundError):
            raise PushError(f"{error}; log in: {advice}") from cause
        raise
