"""Data sets: rows from a file reach the environment that they name, and a bad line is named."""

from pathlib import Path

import pytest

from turnwise.envs.registry import make
from turnwise.errors import TaskError
from turnwise.pipeline.tasks import TaskStream, read_rows, routed

KNOWN = ("catch", "echo")


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_go_to_the_environment_that_they_name_and_replace_its_own(tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        '{"environment": "echo", "text": "one"}', "", '{"environment": "echo", "text": "two"}',
    )  # fmt: skip
    data = read_rows(file, KNOWN)
    assert data == {"echo": [{"text": "one"}, {"text": "two"}]}
    specs = {"catch": make("catch", args={"size": 3}), "echo": make("echo")}
    rows = routed(specs, "train", known=KNOWN, data=data)
    assert rows["echo"] == data["echo"]
    assert len(rows["catch"]) == 3


def test_with_one_environment_rows_need_not_name_it(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", '{"text": "one"}'), ["echo"]) == {
        "echo": [{"text": "one"}]
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: a row is a JSON object; found list"),
        ('{"environment": "cach"}', "line 2: .*did you mean 'catch'"),
        ('{"text": "whose?"}', "line 2: a task names no environment"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "rows.jsonl", '{"environment": "echo", "text": "fine"}', line)
    with pytest.raises(TaskError, match=message):
        read_rows(file, KNOWN)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.jsonl cannot be read: No such file"):
        read_rows(tmp_path / "none.jsonl", KNOWN)


def test_every_pass_of_a_stream_is_a_permutation_and_the_same_each_time() -> None:
    tasks = [{"n": n} for n in range(7)]
    stream = TaskStream("game", "train", tasks, seed=3, salt="rl")
    first = [stream[i]["n"] for i in range(7)]
    second = [stream[i]["n"] for i in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    again = TaskStream("game", "train", tasks, seed=3, salt="rl")
    assert [again[i]["n"] for i in (13, 0, 8)] == [second[6], first[0], second[1]]
    assert stream.seed(4) == again.seed(4) != stream.seed(5)


def test_no_tasks_is_an_error() -> None:
    with pytest.raises(TaskError, match="has no tasks in split 'test'"):
        TaskStream("game", "test", [], seed=0)
