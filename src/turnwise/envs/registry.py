"""`make`: from a name to an environment.

    make("catch", args={"rows": 5})             # of the library
    make("reasoning_gym:chain_sum")             # scheme:rest
    make("my_package.games:Chess")              # an importable class
    make("games/chess.py:Chess")                # a class in a file; `games/chess.py` alone if it has only one
    make(Chess)                                 # a class
    make("http://127.0.0.1:8000")               # an OpenEnv server; a list of addresses for several alike

A class may be an `Env`, a TRL ``environment_factory`` class or an ``AgentProtocol``-like one. Names are
resolved lazily: nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from turnwise.envs.base import Env
from turnwise.envs.session import EnvSpec
from turnwise.envs.spec import class_spec
from turnwise.errors import EnvSpecError, boundary

LIBRARY = "turnwise.envs.library"
BUILTIN: dict[str, tuple[str, str]] = {
    "catch": (f"{LIBRARY}.catch:Catch", "A ball falls through a grid; move the paddle under it (OpenSpiel)."),
    "guess_number": (f"{LIBRARY}.guess_number:GuessNumber", "Find a hidden number by higher and lower."),
    "echo": (f"{LIBRARY}.echo:Echo", "Say back what was said; the smallest environment there is."),
}
"""Name -> class and description."""
LAZY_SCHEMES: dict[str, tuple[str, str, str]] = {
    "reasoning_gym": (
        f"{LIBRARY}.reasoning_gym:make_spec",
        "reasoning_gym:<dataset>",
        "Any dataset of the reasoning-gym package, answered by a tool and scored by the package.",
    ),
}
"""Scheme -> factory, how it is written, description."""
SERVERS = "turnwise.openenv.client.remote:make_spec"
"""Factory of what is given by address."""
ADDRESSES = ("http", "https", "ws", "wss")


class SchemeFactory(Protocol):
    """Makes the environment behind ``scheme:rest``."""

    def __call__(self, rest: str, /, name: str | None, args: Mapping[str, Any]) -> EnvSpec:
        """``rest`` is what follows the scheme and its colon; ``name`` is None where the recipe gives none."""
        ...


_schemes: dict[str, SchemeFactory] = {}
_files: dict[Path, ModuleType] = {}


def make(
    spec: str | Sequence[str] | type | EnvSpec | Callable[[], Any],
    *,
    name: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> EnvSpec:
    """Resolve an environment.

    Args:
        spec: A name as in the module's docstring, a class, a TRL-style factory, or a spec, returned as it is;
            or addresses of servers of one environment.
        name: What the run calls it; the name or the class's name if not given.
        args: Keyword arguments of its constructor.

    Raises:
        EnvSpecError: Nothing answers to the name, or it is no environment, or does not take the arguments.
        MissingExtraError: It needs a package that is not installed.
    """
    args = dict(args or {})
    if isinstance(spec, str):
        return _by_name(spec, name, args)
    if isinstance(spec, list | tuple):
        return _by_address(spec, name, args)
    if not isinstance(spec, type) and hasattr(spec, "open") and hasattr(spec, "fingerprint"):
        if args or name not in (None, cast(EnvSpec, spec).name):
            raise EnvSpecError("a spec is made already: name and args go to the `make` that makes it")
        return cast(EnvSpec, spec)
    if not callable(spec):
        raise EnvSpecError(f"expected a name, a class or a spec; found {type(spec).__name__}")
    return _by_class(spec, name or str(getattr(spec, "__name__", "env")), args, _reference(spec))


def named(spec: str) -> Any:
    """What ``pkg.module:Class`` or ``file.py:Class`` names, whatever it is; None for any other name.

    Raises:
        EnvSpecError: There is no such file, module or class.
    """
    head, _, attribute = spec.rpartition(":")
    if head in {*LAZY_SCHEMES, *_schemes} or attribute.startswith("//") or not head:
        return None
    return (
        _attribute(_import_file(head, spec), attribute, spec) if head.endswith(".py") else _load(spec, spec)
    )


def register_scheme(scheme: str, factory: SchemeFactory) -> None:
    """Let ``make("scheme:rest")`` call ``factory(rest, name=…, args=…)``; replaces an earlier one."""
    _schemes[scheme] = factory


def available() -> dict[str, str]:
    """What comes with Turnwise: names as `make` takes them, with one line each."""
    out = {name: description for name, (_, description) in BUILTIN.items()}
    out.update({form: description for _, form, description in LAZY_SCHEMES.values()})
    return out


# ---------------------------------------------------------------------------------------------------


def _by_name(spec: str, name: str | None, args: Mapping[str, Any]) -> EnvSpec:
    if spec in BUILTIN:
        return _by_class(_load(BUILTIN[spec][0], spec), name or spec, args, spec)
    head, colon, rest = spec.partition(":")
    if colon and head in _schemes:
        return _schemes[head](rest, name=name or spec, args=args)
    if colon and head in LAZY_SCHEMES:
        factory = cast(SchemeFactory, _load(LAZY_SCHEMES[head][0], spec))
        return factory(rest, name=name or spec, args=args)
    if rest.startswith("//"):
        return _by_address([spec], name, args)
    path, _, attribute = spec.rpartition(":")
    if not path.endswith(".py"):
        path, attribute = (spec, "") if spec.endswith(".py") else ("", "")
    if path:
        module = _import_file(path, spec)
        found = _attribute(module, attribute, spec) if attribute else _only_env(module, spec)
        attribute = attribute or found.__name__
        return _by_class(
            found, name or attribute.rpartition(".")[2], args, f"{Path(path).resolve()}:{attribute}"
        )
    if colon and rest:
        found = _load(spec, spec)
        return _by_class(found, name or rest.rpartition(".")[2], args, spec)
    known = [*BUILTIN, *(f"{scheme}:…" for scheme in {**LAZY_SCHEMES, **_schemes})]
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise EnvSpecError(
        f"unknown environment '{spec}'.{hint} `turnwise env list` shows what there is; "
        "your own is written pkg.module:Class or path/to/file.py:Class"
    )


def unsigned(url: str) -> str:
    """An address without user and password, to be told."""
    return re.sub(r"^([a-z]*://)?[^/]*@", r"\1", url, flags=re.IGNORECASE)


def _by_address(urls: Sequence[Any], name: str | None, args: Mapping[str, Any]) -> EnvSpec:
    for url in urls:
        if not isinstance(url, str) or url.partition("://")[0] not in ADDRESSES:
            told = unsigned(url) if isinstance(url, str) else url
            raise EnvSpecError(f"environment {told!r} is no address; write {'://, '.join(ADDRESSES)}://")
    make_servers = _load(SERVERS, str(urls[0]) if urls else "[]")
    made: EnvSpec = make_servers(urls, name=name, args=args)
    return made


def _by_class(target: Any, name: str, args: Mapping[str, Any], reference: str | None) -> EnvSpec:
    """A class of any of the shapes that work as they are."""
    if isinstance(target, type) and issubclass(target, Env):
        return class_spec(target, name=name, args=args, reference=reference)
    if not callable(target):
        raise EnvSpecError(f"environment {name}: a {type(target).__name__} is no environment; name a class")
    shaped = target if isinstance(target, type) else None
    if shaped is not None and callable(getattr(shaped, "step", None)) and hasattr(shaped, "tools"):
        from turnwise.envs import agent_protocol

        return class_spec(agent_protocol.adapt(shaped), name=name, args=args, reference=reference)
    if shaped is None or callable(getattr(shaped, "reset", None)):
        from turnwise.envs import trl_class

        return class_spec(trl_class.adapt(target), name=name, args=args, reference=reference)
    raise EnvSpecError(
        f"environment {name}: {target.__name__} is no environment: subclass turnwise.Env, or define reset"
    )


def _reference(target: Any) -> str | None:
    """How another process would find ``target``; None where it could not."""
    qualname = getattr(target, "__qualname__", "<none>")
    if "<" in qualname:
        return None
    module = sys.modules.get(target.__module__)
    source = getattr(module, "__file__", None)
    if module is None or source is None:
        return None
    if target.__module__ == "__main__" or module in _files.values():
        return f"{Path(source).resolve()}:{qualname}"
    return f"{target.__module__}:{qualname}"


def _load(reference: str, spec: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    if attribute.partition("/")[0].isdecimal():
        raise EnvSpecError(
            f"environment '{spec}' is no name; a server's address begins with its scheme: http://{spec}"
        )
    with boundary(EnvSpecError, f"environment '{spec}': importing {module_name}"):
        module = importlib.import_module(module_name)
    return _attribute(module, attribute, spec)


def _import_file(path: str, spec: str) -> ModuleType:
    """The module of a file, once for each file: two files of one name are two modules."""
    file = Path(path).resolve()
    if file in _files:
        return _files[file]
    if not file.is_file():
        raise EnvSpecError(f"environment '{spec}': there is no file {file}")
    module_name = f"turnwise_env_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    source = importlib.util.spec_from_file_location(module_name, file)
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    # Registered before it runs: dataclasses and pickling look their module up by name.
    sys.modules[module_name] = module
    try:
        with boundary(EnvSpecError, f"environment '{spec}': importing {file}"):
            source.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    _files[file] = module
    return module


def _attribute(module: ModuleType, attribute: str, spec: str) -> Any:
    target: Any = module
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if target is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"environments there: {_shaped_in(module) or 'none'}"
        where = module.__file__ if module in _files.values() else module.__name__
        raise EnvSpecError(f"environment '{spec}': {where} has no '{attribute}'; {hint}")
    return target


def _only_env(module: ModuleType, spec: str) -> type[Env]:
    classes = _envs_in(module)
    if len(classes) != 1:
        found = _shaped_in(module) or "none"
        raise EnvSpecError(f"environment '{spec}': say which class, as {spec}:Class; found {found}")
    return classes[0]


def _shaped_in(module: ModuleType) -> str:
    """Names of the classes there that are environments by their shape: an `Env`, TRL's, OpenEnv's."""
    shaped = (
        value.__name__
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and callable(getattr(value, "reset", None))
    )
    return ", ".join(shaped)


def _envs_in(module: ModuleType) -> list[type[Env]]:
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Env) and value.__module__ == module.__name__
    ]
