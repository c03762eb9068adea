"""`wheel`: the Turnwise that runs, as a wheel that a package carries with it, for where no index has it.

The name ``turnwise`` on PyPI is another project's, so that a requirement that says no more than the name
installs a stranger's code. This wheel's version ends in a hash of what is in it (``0.1.0+v1f0c…``), a local
version, which no public index takes: who asks for it gets this wheel or an error.

It is written here, not by a build backend, which would have to be downloaded: the files, and what the project
says of itself (https://packaging.python.org/en/latest/specifications/binary-distribution-format/).
"""

from __future__ import annotations

import base64
import hashlib
import io
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from turnwise.errors import EnvSpecError

NAME = "turnwise"
PACKAGE = Path(__file__).parents[1]
HASH_CHARS = 12
WRITTEN = (1980, 1, 1, 0, 0, 0)
"""Of every file: the same contents are the same wheel, and the same hash in ``uv.lock``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel that is not written yet."""

    version: str
    data: bytes

    @property
    def filename(self) -> str:
        """As pip and uv read it."""
        return f"{NAME}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Project:
    """What a wheel says of what is in it."""

    version: str
    """Without what `wheel` adds to it."""
    python: str
    requires: tuple[str, ...]
    """With those of extras, as ``Requires-Dist`` has them."""
    extras: tuple[str, ...]
    scripts: tuple[tuple[str, str], ...]
    license: str


def wheel() -> Wheel:
    """The Turnwise that runs, with its requirements.

    Raises:
        EnvSpecError: It is neither installed nor in its repository, so that its requirements are not known.
    """
    project = _stated(PACKAGE.parents[1]) or _installed()
    inside = {
        f"{NAME}/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }
    digest = hashlib.sha256(repr((project, sorted(inside.items()))).encode()).hexdigest()
    version = f"{project.version}+v{digest[:HASH_CHARS]}"
    metadata = [
        "Metadata-Version: 2.1", f"Name: {NAME}", f"Version: {version}", f"Requires-Python: {project.python}",
        *(f"Provides-Extra: {one}" for one in project.extras),
        *(f"Requires-Dist: {one}" for one in project.requires),
    ]  # fmt: skip
    about = f"{NAME}-{version}.dist-info"
    texts = {
        "METADATA": "\n".join(metadata) + "\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: turnwise\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "\n".join(["[console_scripts]", *map(" = ".join, project.scripts)]) + "\n",
        "licenses/LICENSE": project.license,
    }
    inside |= {f"{about}/{name}": text.encode() for name, text in texts.items()}
    record = [*(_recorded(name, data) for name, data in inside.items()), f"{about}/RECORD,,"]
    inside[f"{about}/RECORD"] = ("\n".join(record) + "\n").encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in inside.items():
            entry = zipfile.ZipInfo(name, WRITTEN)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            file.writestr(entry, data)
    return Wheel(version=version, data=archive.getvalue())


def _stated(repository: Path) -> _Project | None:
    """What the repository around the package says: an editable installation's own metadata may be older."""
    path = repository / "pyproject.toml"
    stated: dict[str, Any] = (
        tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}) if path.exists() else {}
    )
    if stated.get("name") != NAME:
        return None
    extras: dict[str, list[str]] = stated.get("optional-dependencies", {})
    requires = [*stated["dependencies"], *(_of(extra, one) for extra in extras for one in extras[extra])]
    return _Project(
        version=stated["version"],
        python=stated["requires-python"],
        requires=tuple(requires),
        extras=tuple(extras),
        scripts=tuple(stated["scripts"].items()),
        license=(repository / "LICENSE").read_text(encoding="utf-8"),
    )


def _installed() -> _Project:
    """What the installed distribution says."""
    try:
        found = distribution(NAME)
    except PackageNotFoundError as error:
        raise EnvSpecError(
            f"{PACKAGE} is not installed, so that its requirements are not known: "
            "`pip install -e .` in its repository"
        ) from error
    scripts = [(one.name, one.value) for one in found.entry_points if one.group == "console_scripts"]
    return _Project(
        version=found.version.partition("+")[0],
        python=found.metadata["Requires-Python"],
        requires=tuple(found.requires or ()),
        extras=tuple(found.metadata.get_all("Provides-Extra") or ()),
        scripts=tuple(scripts),
        license=found.read_text("licenses/LICENSE") or "",
    )


def _of(extra: str, requirement: str) -> str:
    """An extra's requirement as ``Requires-Dist`` has it."""
    what, semicolon, marker = requirement.partition(";")
    own = f"({marker.strip()}) and " if semicolon else ""
    return f"{what.strip()}; {own}extra == '{extra}'"


def _recorded(name: str, data: bytes) -> str:
    """A line of ``RECORD``."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"
