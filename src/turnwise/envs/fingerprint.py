"""`fingerprint`: a hash of all that decides what an environment's rewards mean.

The class and its bases, their name, arguments, tools and system message; the modules that theirs import from
their own folder, directly or through each other; and the versions of what else these import. Read from the
sources and never by importing, so that it is the same whatever has been imported before.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from turnwise.envs.base import Env


def fingerprint(env_class: type[Env], name: str, args: Mapping[str, Any]) -> str:
    """A short hex digest."""
    # An adapter's class holds the class that it speaks for.
    mro = [*env_class.__mro__, *getattr(env_class, "inner_class", object).__mro__]
    classes = [one for one in mro if one is not object and one is not Env]
    modules = _modules(classes)
    parts: dict[str, Any] = {
        "name": name,
        "args": args,
        "system": env_class.system,
        "tools": [tool.schema.as_function() for tool in env_class.toolset()],
        "source": [_source(one) for one in (*classes, *_functions(env_class))],
        "helpers": _digests(modules),
        "versions": _versions(classes, modules),
    }
    text = json.dumps(parts, sort_keys=True, default=lambda value: type(value).__qualname__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _functions(env_class: type[Env]) -> list[Any]:
    """Functions that an adapter's class offers as tools though they are no methods of any class."""
    return [tool.bind(None) for tool in getattr(env_class, "given_tools", ())]


def _source(definition: Any) -> str:
    try:
        return inspect.getsource(definition)
    except (OSError, TypeError):  # Made at a prompt or at run time: its name is all there is.
        return str(definition.__qualname__)


def _modules(classes: list[type]) -> dict[Path, set[Path]]:
    """The modules of the classes, as files; and of each those that it imports from its own folder."""
    found: dict[Path, set[Path]] = {}
    for klass in classes:
        file = getattr(sys.modules.get(klass.__module__), "__file__", None)
        start = Path(file).resolve() if file is not None else None
        if start is None or start.suffix != ".py" or start in found:
            continue
        seen, waiting = {start}, [start]
        while waiting:
            for _, helper in _imports(waiting.pop(), start.parent):
                if helper is not None and helper not in seen:
                    seen.add(helper)
                    waiting.append(helper)
        found[start] = seen - {start}
    return found


def _digests(modules: Mapping[Path, set[Path]]) -> dict[str, str]:
    """Digests of the helpers, by path in their folder."""
    return {
        str(helper.relative_to(start.parent)): hashlib.sha256(helper.read_bytes()).hexdigest()
        for start, helpers in modules.items()
        for helper in helpers
    }


def _versions(classes: list[type], modules: Mapping[Path, set[Path]]) -> dict[str, str]:
    """Versions of the distributions that the classes come from, and of those that their modules import."""
    names = {klass.__module__.partition(".")[0] for klass in classes}
    for start, helpers in modules.items():
        for file in (start, *helpers):
            names |= {name for name, helper in _imports(file, start.parent) if helper is None}
    found = {name: _version(name) for name in sorted(names - sys.stdlib_module_names - {"turnwise"})}
    return {name: version for name, version in found.items() if version is not None}


@cache
def _version(package: str) -> str | None:
    """Of the distribution that holds a package; None for what is not installed, or not as a distribution."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(package, ())
        return metadata.version(names[0]) if names else None


def _imports(file: Path, folder: Path) -> Iterator[tuple[str, Path | None]]:
    """What a module imports, anywhere in it: the package's name, and the file where that is in ``folder``."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # Changed since it was imported: its class is still in the hash.
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], _found(alias.name, 0, file, folder)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            # What is imported from a package may be a module of it.
            names = [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]
            files = [_found(name, node.level, file, folder) for name in names if name]
            for found in files:
                if found is not None:
                    yield module, found
            if not node.level and not any(files):
                yield module.partition(".")[0], None


def _found(name: str, level: int, file: Path, folder: Path) -> Path | None:
    """The file of a module, where it is in ``folder`` or below."""
    if level:
        root = file.parents[level - 1]
    else:
        root = folder
        while (root / "__init__.py").is_file():
            root = root.parent
    path = root.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file() and candidate.resolve().is_relative_to(folder):
            return candidate.resolve()
    return None
