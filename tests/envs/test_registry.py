"""From names to environments."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from turnwise import Env
from turnwise.envs import registry
from turnwise.envs.registry import available, make, register_scheme
from turnwise.envs.session import Limits
from turnwise.errors import EnvSpecError

ENV = """
from __future__ import annotations
from dataclasses import dataclass
from turnwise import Env, tool

@dataclass
class Point:
    x: int

class Game(Env):
    max_tool_calls = 4
    def __init__(self, size: int = 3, *, seed_word: str = "WORD"):
        self.size = size
    def reset(self, task):
        return "WORD"
    @tool
    def go(self, to: Point) -> int:
        "Go."
        return to.x
"""


@pytest.fixture
def game(tmp_path):
    path = tmp_path / "game.py"
    path.write_text(ENV)
    return path


def test_a_class_in_a_file(game):
    spec = make(f"{game}:Game", args={"size": 4})
    assert spec.name == "Game"
    assert spec.limits == Limits(max_tool_calls=4)
    assert make(str(game), name="mine").name == "mine"
    assert make(f"{game}:Game").env_class is make(str(game)).env_class


def test_two_files_of_one_name_are_two_modules(game, tmp_path):
    other = tmp_path / "other" / "game.py"
    other.parent.mkdir()
    other.write_text(ENV.replace("WORD", "OTHER"))

    async def first(path):
        env = await make(f"{path}:Game").open(Limits())
        return (await env.reset({}, 0))[0].content

    assert asyncio.run(first(game)) == "WORD"
    assert asyncio.run(first(other)) == "OTHER"


def test_an_importable_class(monkeypatch, game):
    monkeypatch.syspath_prepend(game.parent)
    spec = make("game:Game")
    assert spec.name == "Game"
    assert spec.reference == "game:Game"


def test_a_class_and_a_spec():
    class Local(Env):
        def reset(self, task):
            return "hi"

    spec = make(Local)
    assert (spec.name, spec.reference) == ("Local", None)
    assert make(spec) is spec
    with pytest.raises(EnvSpecError, match="a spec is made already"):
        make(spec, name="other")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cacth", "unknown environment 'cacth'. Did you mean 'catch'. `turnwise env list`"),
        ("chess", "unknown environment 'chess'.*pkg.module:Class or path/to/file.py:Class"),
        ("no_such_package.games:Chess", "importing no_such_package.games: ModuleNotFoundError"),
        ("nowhere.py:Chess", "there is no file .*nowhere.py"),
        ("ftp://localhost:8000", "'ftp://localhost:8000' is no address; write http://"),
        ("http://", "'http://' is no address of a server; write http://host:port"),
        ("turnwise.envs.base:Evn", "turnwise.envs.base has no 'Evn'; did you mean 'Env'?"),
        ("turnwise.types:Message", "environment Message: Message is no environment: subclass turnwise.Env"),
        ("turnwise.envs.base:Env", "environment Env: Env must define reset"),
        ("127.0.0.1:8311", "begins with its scheme: http://127.0.0.1:8311"),
        ("localhost:8000/games", "begins with its scheme: http://localhost:8000/games"),
        ("os:path", "environment path: a module is no environment; name a class"),
        ("os.path:join", r"join\(\) makes no environment: TypeError: join\(\) missing"),
    ],
)
def test_what_cannot_be_made(spec, message):
    with pytest.raises(EnvSpecError, match=message):
        make(spec)


def test_names_in_a_file(game, tmp_path):
    with pytest.raises(EnvSpecError, match=r"has no 'Gmae'; did you mean 'Game'\?"):
        make(f"{game}:Gmae")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(EnvSpecError, match=r"say which class, as .*empty\.py:Class; found none"):
        make(str(empty))
    other = tmp_path / "other.py"
    other.write_text("from turnwise import Env\nclass Board:\n    def reset(self): ...\nclass Piece: ...\n")
    for spec in (f"{other}:Nope", str(other)):
        with pytest.raises(EnvSpecError, match=r"other\.py.*Board$") as told:
            make(spec)
        assert "turnwise_env_" not in str(told.value) and "Piece" not in str(told.value)
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_thing\n")
    for _ in range(2):  # A file that failed to import is not half there afterwards.
        with pytest.raises(EnvSpecError, match=r"importing .*broken.py: ModuleNotFoundError"):
            make(f"{broken}:X")


def test_arguments_are_checked(game):
    with pytest.raises(EnvSpecError, match="environment Game: unknown argument 'sise'; did you mean 'size'"):
        make(f"{game}:Game", args={"sise": 4})
    with pytest.raises(EnvSpecError, match="unknown argument 'rows'; allowed: size, seed_word"):
        make(f"{game}:Game", args={"rows": 4})

    class Needs(Env):
        def __init__(self, word: str):
            self.word = word

        def reset(self, task):
            return self.word

    with pytest.raises(EnvSpecError, match="environment Needs: argument 'word' is required"):
        make(Needs)


def test_schemes():
    made = []

    def factory(rest, *, name, args):
        made.append((rest, name, dict(args)))
        return make("echo", name=name)

    register_scheme("testing", factory)
    try:
        assert make("testing:a:b", args={"k": 1}).name == "testing:a:b"
        assert make("testing:", name="t").name == "t"
    finally:
        del registry._schemes["testing"]
    assert made == [("a:b", "testing:a:b", {"k": 1}), ("", "t", {})]


def test_the_fingerprint_follows_what_rewards_depend_on(game, tmp_path):
    first = make(f"{game}:Game").fingerprint
    assert make(f"{game}:Game").fingerprint == first
    assert make(f"{game}:Game", args={"size": 4}).fingerprint != first
    changed = tmp_path / "changed" / "game.py"
    changed.parent.mkdir()
    changed.write_text(ENV.replace("return to.x", "return to.x + 1"))
    assert make(f"{changed}:Game").fingerprint != first


def test_the_fingerprint_follows_helper_modules_and_versions(tmp_path, monkeypatch):
    from turnwise.envs import fingerprint

    files = {
        "game.py": ENV.replace("from dataclasses", "import a_helper\nfrom dataclasses"),
        "a_helper.py": "import json\nimport numpy\nimport a_deeper_one\nRULE = 1\n",
        "a_deeper_one.py": "RULE = 2\n",
        "a_stranger.py": "RULE = 3\n",
    }
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def made() -> str:
        fingerprint._version.cache_clear()
        return make(f"{tmp_path}/game.py:Game").fingerprint

    first = made()
    assert made() == first
    (tmp_path / "a_stranger.py").write_text("RULE = 4\n")
    assert made() == first, "nothing imports it"
    (tmp_path / "a_deeper_one.py").write_text("RULE = 5\n")
    deeper = made()
    assert deeper != first
    (tmp_path / "a_deeper_one.py").write_text(files["a_deeper_one.py"])
    assert made() == first
    version = fingerprint._version
    monkeypatch.setattr(fingerprint, "_version", lambda name: "0" if name == "numpy" else version(name))
    assert make(f"{tmp_path}/game.py:Game").fingerprint != first, "a helper imports it"


def test_the_fingerprint_of_a_dataset_names_the_package_that_makes_it(monkeypatch):
    pytest.importorskip("reasoning_gym")
    from turnwise.envs import fingerprint

    first = make("reasoning_gym:chain_sum").fingerprint
    version = fingerprint._version
    monkeypatch.setattr(
        fingerprint, "_version", lambda name: "0" if name == "reasoning_gym" else version(name)
    )
    assert make("reasoning_gym:chain_sum").fingerprint != first


@pytest.mark.parametrize("name", ["catch", "guess_number", "echo"])
def test_the_library_is_there(name):
    async def first():
        spec = make(name)
        env = await spec.open(spec.limits)
        try:
            return spec, await env.reset(next(iter(spec.tasks("train"))), 0)
        finally:
            await env.close()

    spec, messages = asyncio.run(first())
    assert spec.name == name
    assert messages[-1].text


def test_listing_and_importing_are_light():
    assert set(available()) == {"catch", "guess_number", "echo", "reasoning_gym:<dataset>"}
    script = (
        "import sys; from turnwise.envs.registry import available, make; available(); make('echo'); "
        "heavy = ('torch', 'transformers', 'reasoning_gym', 'pydantic', 'yaml'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
