"""``turnwise env``: what a person sees, and the exit codes that a script sees."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from turnwise.cli.env import app, parse_args
from turnwise.cli.env_play import InputError, describe_reply, read_reply
from turnwise.errors import EnvSpecError, TaskError
from turnwise.types import Message, ToolCall, ToolSchema

MOVE = ToolSchema(
    name="move",
    description="Move.",
    parameters={
        "type": "object",
        "properties": {"direction": {"type": "string"}, "steps": {"type": "integer"}},
        "required": ["direction"],
    },
)


def run(*args, stdin=None):
    result = CliRunner().invoke(app, list(args), input=stdin, env={"COLUMNS": "100"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def call(name, **arguments):
    return Message.assistant("", ToolCall(name=name, arguments=arguments))


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("move left", call("move", direction="left")),
        ("move left 2", call("move", direction="left", steps=2)),
        ("move steps=2 direction=left", call("move", direction="left", steps=2)),
        ("move steps=2 left", call("move", steps=2, direction="left")),
        ("move 'far left'", call("move", direction="far left")),
        ("move left soon", call("move", direction="left", steps="soon")),
        ("move", call("move")),
        ('{"name": "move", "arguments": {"direction": "left"}}', call("move", direction="left")),
        ('{"direction": "left"}', call("move", direction="left")),
        ("I would move left", Message.assistant("I would move left")),
        ("/say move left", Message.assistant("move left")),
    ],
)
def test_a_typed_line_is_a_call_or_text(line, reply):
    assert read_reply(line, [MOVE]) == reply


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"direction": ', "not JSON"), ("move 'left", "No closing quotation"), ("move a 1 2", "one too many")],
)
def test_what_cannot_be_read_is_told(line, message):
    with pytest.raises(InputError, match=message):
        read_reply(line, [MOVE])


def test_the_last_text_argument_takes_the_rest_of_the_line():
    say = ToolSchema(
        name="say", description="", parameters={"type": "object", "properties": {"text": {"type": "string"}}}
    )
    assert read_reply("say good morning all", [say]) == call("say", text="good morning all")


def test_a_reply_is_shown_as_it_could_be_typed():
    reply = call("move", direction="far left", steps=2)
    assert describe_reply(reply) == "move direction='far left' steps=2"
    assert read_reply(describe_reply(reply), [MOVE]) == reply


def test_arguments_are_yaml():
    assert parse_args(["rows=6", "wind=0.3", "observation=grid", "parts=[{name: gcd}]"]) == {
        "rows": 6, "wind": 0.3, "observation": "grid", "parts": [{"name": "gcd"}],
    }  # fmt: skip
    with pytest.raises(EnvSpecError, match="is not KEY=VALUE"):
        parse_args(["rows"])
    with pytest.raises(EnvSpecError, match="not YAML"):
        parse_args(["rows=[1"])


def test_play_from_piped_lines():
    lines = "move left\nmove up\nmove direction=stay\n\n/tools\nmove stay\n"
    code, out = run("play", "catch", "-a", "rows=4", stdin=lines)
    assert code == 0
    assert [line.strip() for line in out.splitlines()] == [
        "catch  train row 0, seed 0",
        'move(direction: one of "left", "stay", "right")',
        "Move the paddle one column, or let it stay; the ball falls one row. Column 0 is at the left.",
        "/say TEXT for plain text, /teacher to ask the teacher, /tools, /quit",
        "ball 0 paddle 2 rows 3",
        "› move left",
        "ball 0 paddle 1 rows 2",
        "› move up",
        'move: direction: expected one of "left", "stay", "right"; found "up".',
        "› move direction=stay",
        "ball 0 paddle 1 rows 1",
        "›",
        "› /tools",
        'move(direction: one of "left", "stay", "right")',
        "Move the paddle one column, or let it stay; the ball falls one row. Column 0 is at the left.",
        "/say TEXT for plain text, /teacher to ask the teacher, /tools, /quit",
        "› move stay",
        "missed",
        "reward 0  the task is over, 4 turns",
    ]


def test_an_empty_line_says_what_the_teacher_says():
    code, out = run("play", "guess_number", "-a", "high=16", "--teacher", stdin="\n" * 9)
    assert code == 0
    assert "teacher: guess number=8" in out
    assert "reward 1  the task is over" in out


def test_leaving_early_is_no_error():
    code, out = run("play", "echo", stdin="")
    assert (code, out.splitlines()[-1]) == (0, "left the game after 0 turns")


def test_a_row_that_is_not_there():
    with pytest.raises(TaskError, match="has 80 rows; there is no row 500"):
        run("play", "guess_number", "--task", "500", stdin="")


def test_escape_sequences_of_an_environment_are_shown_and_not_obeyed(tmp_path):
    (tmp_path / "rude.py").write_text(
        "from turnwise.envs import Env\n"
        "class Rude(Env):\n"
        "    def reset(self, task):\n"
        "        return '\\x1b[2Jgone [red]?[/red]'\n"
    )
    _, out = run("play", f"{tmp_path / 'rude.py'}:Rude", stdin="")
    assert "␛[2Jgone [red]?[/red]" in out and "\x1b[2J" not in out


@pytest.mark.parametrize("command", ["check", "play"])
def test_help_says_that_a_server_will_do(command):
    _, out = run(command, "--help")
    assert "http://127.0.0.1:8000" in out


def test_check_says_what_it_found_and_exits_by_it(tmp_path):
    code, out = run("check", "catch", "--arg", "rows=6")
    assert code == 0
    assert out.splitlines()[0] == "catch" and out.splitlines()[-1] == "ready to train on"
    assert "it earns the top reward, 1, on every task" in out
    code, out = run("check", "catch", "-a", "rows=6", "-a", "error=0.5")
    assert (code, out.splitlines()[-1]) == (0, "1 warning")
    (tmp_path / "broken.py").write_text(
        "from turnwise.envs import Env\n"
        "class Broken(Env):\n"
        "    def reset(self, task):\n"
        "        raise RuntimeError('no server')\n"
    )
    code, out = run("check", f"{tmp_path / 'broken.py'}:Broken")
    assert code == 1
    assert "RuntimeError: no server" in " ".join(out.split())
    assert out.splitlines()[-1] == "1 error"
    assert out.splitlines()[-1] == "1 error"


def test_list_names_the_library_and_the_datasets():
    code, out = run("list")
    assert code == 0
    for name in ("catch", "guess_number", "echo", "reasoning_gym:<dataset>", "rows=10"):
        assert name in out
    code, out = run("list", "reasoning_gym")
    assert code == 0 and "chain_sum" in out and "106 datasets" in out
    with pytest.raises(EnvSpecError, match="no list of 'gymnasium'"):
        run("list", "gymnasium")


def test_a_new_environment_passes_its_check_and_its_test(tmp_path):
    code, out = run("new", "web_shop", "--file", "--dir", str(tmp_path))
    assert code == 0 and "WebShop" in out
    code, out = run("check", f"{tmp_path / 'web_shop.py'}:WebShop")
    assert (code, out.splitlines()[-1]) == (0, "ready to train on")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(tests, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "2 passed" in done.stdout, done.stdout
    with pytest.raises(EnvSpecError, match="is there already"):
        run("new", "web_shop", "--file", "--dir", str(tmp_path))


@pytest.mark.parametrize("name", ["WebShop", "2shop", "class", "web-shop"])
def test_a_new_environment_needs_a_module_name(name, tmp_path):
    with pytest.raises(EnvSpecError, match="cannot name a module"):
        run("new", name, "--dir", str(tmp_path))


@pytest.mark.parametrize("name", ["none", "step", "tool_call"])
def test_a_new_environment_does_not_hide_what_its_file_needs(name, tmp_path):
    with pytest.raises(EnvSpecError, match=f"choose another name, such as my_{name}"):
        run("new", name, "--dir", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_server_is_not_served_again():
    with pytest.raises(EnvSpecError, match=r"is a server already.*turnwise env play http://127.0.0.1:9"):
        run("serve", "http://127.0.0.1:9")


def test_importing_the_verbs_is_light():
    script = "import sys, json, turnwise.cli.env; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {
        "torch",
        "transformers",
        "reasoning_gym",
        "turnwise.envs.check",
        "turnwise.cli.env_play",
    }
