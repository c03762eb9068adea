"""HTTP: episodes by cookie or episode_id, stateless requests, what is refused and how."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from PIL import Image
from tests.openenv.containers import until
from tests.openenv.serving import as_app, running
from websockets.asyncio.client import connect

from turnwise import images
from turnwise.envs.base import Env, tool
from turnwise.openenv.server import app, sessions
from turnwise.openenv.server.settings import Settings
from turnwise.types import Step


class Counter(Env):
    """Count up to three."""

    inline = True
    opened = 0
    closed = 0

    def __init__(self) -> None:
        type(self).opened += 1

    def reset(self, task: object) -> str:
        self.count = 0
        return "count"

    @tool
    def add(self, number: int) -> Step:
        """Add."""
        if number < 0:
            raise ValueError("only upwards")
        self.count += number
        return Step(str(self.count), reward=0.5, terminated=self.count >= 3)

    def reward(self) -> dict[str, float | None]:
        return {"total": float(self.count), "style": None}

    def close(self) -> None:
        type(self).closed += 1


def call(number: int) -> dict[str, object]:
    return {"type": "call_tool", "tool_name": "add", "arguments": {"number": number}}


def nested(depth: int) -> list[object]:
    inner: list[object] = []
    for _ in range(depth - 1):
        inner = [inner]
    return inner


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    Counter.opened = Counter.closed = 0
    with running(as_app(Counter)) as server, httpx.Client(base_url=server.url) as client:
        yield client
    assert Counter.opened == Counter.closed


def test_a_cookie_makes_an_episode(client: httpx.Client) -> None:
    assert client.post("/reset", json={"seed": 1}).json()["observation"]["text"] == "count"
    first = client.post("/step", json={"action": call(1)}).json()
    assert (first["observation"]["result"], first["reward"], first["done"]) == ("1", 0.5, False)
    last = client.post("/step", json={"action": call(2)}).json()
    assert (last["observation"]["result"], last["reward"], last["done"]) == ("3", 3.5, True)
    assert last["metadata"]["rewards"] == {"total": 3.0, "style": None}
    assert last["metadata"]["step_reward"] == 0.5
    assert last["metadata"]["terminated"] and not last["metadata"]["truncated"]
    assert client.get("/state").json()["step_count"] == 2


def test_episode_ids_tell_episodes_apart(client: httpx.Client) -> None:
    for name in ("a", "b"):
        client.post("/reset", json={"episode_id": name})
    client.cookies.clear()
    client.post("/step", json={"episode_id": "a", "action": call(1)})
    client.post("/step", json={"episode_id": "b", "action": call(2)})
    seen = client.post("/step", json={"episode_id": "a", "action": call(1)}).json()
    assert seen["observation"]["result"] == "2"
    assert client.get("/state", params={"episode_id": "b"}).json()["episode_id"] == "b"


def test_clients_that_choose_the_same_episode_id_share_no_environment() -> None:
    with (
        running(as_app(Counter)) as server,
        httpx.Client(base_url=server.url) as one,
        httpx.Client(base_url=server.url) as other,
    ):
        chosen = {"episode_id": "e"}

        def add(client: httpx.Client, number: int) -> object:
            answer = client.post("/step", json={**chosen, "action": call(number)})
            return answer.status_code if answer.is_error else answer.json()["observation"]["result"]

        one.post("/reset", json=chosen)
        assert add(one, 1) == "1"  # With its cookie: from here on it is its own.
        other.post("/reset", json=chosen)
        assert (add(other, 2), add(one, 1)) == ("2", "2")
        assert len(server.sessions.live) == 2
        assert one.get("/state", params=chosen).json()["step_count"] == 2
        stranger = {"turnwise_session": "somebody."}
        assert httpx.get(f"{server.url}/state", params=chosen, cookies=stranger).status_code == 404


def test_who_keeps_no_cookies_takes_over_by_a_reset_and_shares_nothing(client: httpx.Client) -> None:
    """Programs without a cookie jar come back by the id alone, and their resets look like anybody's."""
    chosen = {"episode_id": "e"}
    client.post("/reset", json=chosen)
    for _ in range(2):
        assert httpx.post(f"{client.base_url}/reset", json=chosen).status_code == 200
        again = httpx.post(f"{client.base_url}/step", json={**chosen, "action": call(1)})
        assert again.json()["observation"]["result"] == "1"
    lost = client.post("/step", json={**chosen, "action": call(1)})
    assert lost.status_code == 404 and "a later reset" in lost.json()["detail"]


def test_without_either_each_request_has_an_environment_of_its_own(client: httpx.Client) -> None:
    before = Counter.opened
    answer = client.post("/step", json={"action": {"type": "list_tools"}})
    assert answer.json()["observation"]["tools"][0]["name"] == "add"
    assert client.get("/state").json()["episode_id"] is None
    assert (Counter.opened - before, Counter.closed) == (2, 2)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/reset", {"seed": -1}, 422),
        ("POST", "/reset", {"seed": "x"}, 422),
        ("POST", "/reset", {"sead": 1}, 422),
        ("POST", "/reset", {"split": "nope"}, 422),
        ("POST", "/reset", {"episode_id": "x" * 256}, 422),
        ("POST", "/step", {}, 422),
        ("POST", "/step", {"action": {"type": "nope"}}, 422),
        ("POST", "/step", {"action": call(1)}, 422),
        ("POST", "/step", {"action": call(1), "episode_id": "never"}, 404),
        ("POST", "/step", {"action": call(1), "timeout_s": 0}, 422),
        ("POST", "/step", {"action": call(1), "verbose": True}, 422),
        ("POST", "/step", {"action": {"type": "list_tools"}, "request_id": "1\r\nX-Made-Up: 2"}, 422),
        ("POST", "/step", {"action": {"type": "list_tools"}, "request_id": "1\n"}, 422),
        ("POST", "/reset", {"task": {"a": nested(700)}}, 422),
        ("GET", "/state?episode_id=never", None, 404),
        ("GET", "/nope", None, 404),
        ("GET", "/reset", None, 405),
    ],
)
def test_what_is_refused(client: httpx.Client, method: str, path: str, body: object, status: int) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]


def test_a_request_id_comes_back(client: httpx.Client) -> None:
    asked = {"action": {"type": "list_tools"}, "request_id": "number 1"}
    assert client.post("/step", json=asked).headers["X-Request-Id"] == "number 1"


def test_a_tool_that_raises_is_an_observation(client: httpx.Client) -> None:
    client.post("/reset")
    seen = client.post("/step", json={"action": call(-1)}).json()
    error = seen["observation"]["error"]
    assert error["error_type"] == "execution_error" and "only upwards" in error["message"]
    wrong = client.post("/step", json={"action": {**call(0), "arguments": {"number": "many"}}}).json()
    assert wrong["observation"]["error"]["error_type"] == "invalid_args"
    assert wrong["metadata"]["error"] == "bad_arguments"


def test_an_environment_that_fails_is_a_500_that_says_so() -> None:
    class Broken(Env):
        inline = True

        def reset(self, task: object) -> str:
            raise ValueError("no luck")

        def step(self, reply: str) -> Step:
            return Step("")

    with running(as_app(Broken)) as server:
        answer = httpx.post(f"{server.url}/reset")
        assert answer.status_code == 500
        assert answer.json()["kind"] == "EnvError" and "no luck" in answer.json()["detail"]


def test_requests_of_one_episode_never_overlap() -> None:
    class Slow(Env):
        inside = 0

        def reset(self, task: object) -> str:
            return "go"

        @tool
        async def wait(self) -> str:
            """Wait."""
            self.inside += 1
            await asyncio.sleep(0.02)
            alone = self.inside == 1
            self.inside -= 1
            return str(alone)

    async def play(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url) as client:
            await client.post("/reset", json={"episode_id": "e"})
            act = {"episode_id": "e", "action": {"type": "call_tool", "tool_name": "wait", "arguments": {}}}
            answers = await asyncio.gather(*(client.post("/step", json=act) for _ in range(5)))
            return [answer.json()["observation"]["result"] for answer in answers]

    with running(as_app(Slow)) as server:
        assert asyncio.run(play(server.url)) == ["True"] * 5


def test_an_environment_nobody_came_back_to_gives_way(client: httpx.Client) -> None:
    with running(as_app(Counter, Settings(max_sessions=1, queue=4))) as server:
        for _ in range(3):
            assert httpx.post(f"{server.url}/reset", timeout=30).status_code == 200
        with httpx.Client(base_url=server.url) as other:
            other.post("/reset")
            assert other.post("/step", json={"action": call(1)}).status_code == 200
            assert other.get("/state").json()["step_count"] == 1


def reset_on_a_socket(url: str, seconds: float) -> str:
    """What a client of `/ws` is answered, which waits for no longer than it says."""

    async def play() -> str:
        async with connect(f"ws{url[4:]}/ws") as ws:
            await ws.send('{"type": "reset"}')
            return str(json.loads(await asyncio.wait_for(ws.recv(), seconds))["type"])

    return asyncio.run(play())


@pytest.mark.parametrize("chosen", [{}, {"episode_id": "job-1"}])
def test_a_reset_that_nobody_comes_back_to_keeps_nobody_out(chosen: dict[str, str]) -> None:
    with running(as_app(Counter, Settings(max_sessions=1))) as server:
        assert httpx.post(f"{server.url}/reset", json=chosen).status_code == 200
        assert reset_on_a_socket(server.url, 30) == "observation"
        gone = httpx.get(f"{server.url}/state", params={"episode_id": "job-1"})
        assert gone.status_code == 404 and "gave its place" in gone.json()["detail"]


def test_a_session_that_agents_make_and_leave_keeps_nobody_out() -> None:
    with running(as_app(Counter, Settings(max_sessions=1))) as server:
        made = {"jsonrpc": "2.0", "id": 1, "method": "openenv/session/create"}
        name = httpx.post(f"{server.url}/mcp", json=made).json()["result"]["session_id"]
        assert reset_on_a_socket(server.url, 30) == "observation"
        asked = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        gone = httpx.post(f"{server.url}/mcp", json=asked, headers={"mcp-session-id": name})
        assert gone.status_code == 404 and "initialize again" in gone.text


def test_the_longest_idle_gives_way_and_only_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "YIELD_SECONDS", 1.0)
    with running(as_app(Counter, Settings(max_sessions=3))) as server:

        def state(name: str) -> int:
            return httpx.get(f"{server.url}/state", params={"episode_id": name}).status_code

        for name in ("first", "second", "third"):
            httpx.post(f"{server.url}/reset", json={"episode_id": name})
            assert state(name) == 200
        assert state("first") == 200
        time.sleep(1.2)
        assert len(server.sessions.live) == 3  # Nobody needs theirs.
        assert reset_on_a_socket(server.url, 30) == "observation"
        started = time.monotonic()
        assert [state(name) for name in ("second", "third", "first")] == [404, 200, 200]
        # Those were used just now, so who comes waits until one of them is idle for as long.
        httpx.post(f"{server.url}/reset", json={"episode_id": "second"})
        assert state("second") == 200
        assert reset_on_a_socket(server.url, 30) == "observation"
        assert time.monotonic() - started > 0.9
        end = time.monotonic() + 10
        while len(server.sessions.live) != 2:  # The socket's own session ends after it.
            assert time.monotonic() < end
            time.sleep(0.01)


class Slow(Env):
    """Takes its time to begin and to go."""

    begun = False
    together: ClassVar[threading.Barrier | None] = None
    """Those that began wait for each other before they are closed."""

    def reset(self, task: object) -> str:
        self.begun = True
        time.sleep(0.2)
        return "go"

    @tool
    async def wait(self) -> str:
        """Wait."""
        await asyncio.sleep(0.5)
        return "waited"

    def close(self) -> None:
        if self.together is not None and self.begun:
            self.together.wait(60)
        time.sleep(0.4)


def at_once(url: str, *bodies: dict[str, object], path: str = "/reset") -> list[httpx.Response]:
    """The answers to requests of clients that know nothing of each other."""

    async def play() -> list[httpx.Response]:
        async with AsyncExitStack() as stack:
            # All are made before the first asks: each takes a while.
            made = [httpx.AsyncClient(base_url=url, timeout=60) for _ in bodies]
            clients = [await stack.enter_async_context(one) for one in made]
            asking = (client.post(path, json=body) for client, body in zip(clients, bodies, strict=True))
            return await asyncio.gather(*asking)

    return asyncio.run(play())


def test_environments_that_fall_idle_give_way_to_who_waits_already() -> None:
    """None is idle when the others arrive."""
    with running(as_app(Slow, Settings(max_sessions=2, queue_seconds=50))) as server:
        answers = at_once(server.url, *[{}] * 6)
        assert [answer.status_code for answer in answers] == [200] * 6


def test_one_gives_way_only_to_who_is_let_in() -> None:
    with running(as_app(Slow, Settings(max_sessions=1, queue=0))) as server:
        assert [httpx.post(f"{server.url}/reset").status_code for _ in range(2)] == [200, 200]
        codes = sorted(answer.status_code for answer in at_once(server.url, *[{}] * 3))
        assert codes == [200, 503, 503]
        assert len(server.sessions.live) == 1


def test_idle_environments_that_close_slowly_close_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "together", threading.Barrier(4))
    with running(as_app(Slow, Settings(idle_timeout=0.5))) as server:
        answers = at_once(server.url, *({"episode_id": str(number)} for number in range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        until(lambda: not server.sessions.live)
    assert not Slow.together.broken


def test_one_episodes_requests_are_slowed_down_and_only_so_many_wait() -> None:
    with running(as_app(Slow, Settings(rate=20.0, max_ahead=2))) as server:
        with httpx.Client(base_url=server.url) as client:
            taken = []
            for name in ("c", "d", "e"):
                client.post("/reset", json={"episode_id": name})
                started = time.monotonic()
                for _ in range(40):
                    client.get("/state", params={"episode_id": name})
                taken.append(time.monotonic() - started)
            # A second's worth may come at once, and 20 more take a second: at 40 a second none, at 10 three.
            # The machine may have paused in one of them.
            assert 1.0 <= min(taken) < 2.9
        act = {"episode_id": "e", "action": {"type": "call_tool", "tool_name": "wait", "arguments": {}}}
        answers = at_once(server.url, *[act] * 6, path="/step")
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 3
        assert "more than 2 requests" in max(answers, key=lambda one: one.status_code).json()["detail"]


def test_more_than_there_is_room_for_is_told_when_to_come_back() -> None:
    with running(as_app(Counter, Settings(max_sessions=1, queue=0))) as server:
        assert httpx.post(f"{server.url}/reset", json={"episode_id": "mine"}).status_code == 200
        assert httpx.get(f"{server.url}/state", params={"episode_id": "mine"}).status_code == 200
        refused = httpx.post(f"{server.url}/reset", json={"episode_id": "yours"})
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert "1 of 1 sessions" in refused.json()["detail"]


def test_two_resets_of_a_new_episode_at_once_share_it() -> None:
    async def play(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            answers = await asyncio.gather(
                *(client.post("/reset", json={"episode_id": "one"}) for _ in range(8))
            )
            assert {answer.status_code for answer in answers} == {200}

    Counter.opened = 0
    with running(as_app(Counter)) as server:
        asyncio.run(play(server.url))
        assert len(server.sessions.live) == 1


def test_nan_and_numpy_cross_as_json() -> None:
    import numpy as np

    class Odd(Env):
        inline = True

        def reset(self, task: object) -> str:
            return "go"

        def step(self, reply: str) -> Step:
            return Step("ok", reward=np.float32(0.5), info={"n": 1})

    with running(as_app(Odd)) as server, httpx.Client(base_url=server.url) as client:
        client.post("/reset")
        assert client.post("/step", json={"action": {"text": "hi"}}).json()["reward"] == 0.5
        body = '{"action": {"text": "hi", "metadata": {"x": NaN}}}'
        answer = client.post("/step", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200


def test_the_api_describes_itself(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    assert described["info"]["version"] == "1.0.0"
    assert {"/reset", "/step", "/state", "/schema", "/metadata", "/health"} <= described["paths"].keys()
    assert described["paths"]["/mcp"].keys() == {"post", "delete"}
    assert client.get("/docs").status_code == 200
    assert client.get("/health").json() == {"status": "healthy"}
    about = client.get("/metadata").json()
    assert about["name"] == "Counter" and about["description"] == "Count up to three."
    assert about["turnwise"]["tools"][0]["name"] == "add"
    schema = client.get("/schema").json()
    assert schema["action"]["properties"]["tool_name"] == {"enum": ["add"]}


def test_the_task_api() -> None:
    with running(as_app("catch")) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/list_environments").json() == ["catch"]
        assert client.get("/CATCH/splits").json()[1] == {"name": "test", "type": "test"}
        assert client.post("/catch/num_tasks", json={"split": "test"}).json() == {"num_tasks": 500}
        one = client.post("/catch/task", json={"split": "test", "index": 7}).json()["task"]
        assert one == {"id": "test-7", "index": 7, "split": "test", "task": {"column": 2, "seed": 507}}
        some = client.post("/catch/task_range", json={"split": "train", "start": 498}).json()["tasks"]
        assert [row["index"] for row in some] == [498, 499]
        assert client.post("/catch/task", json={"split": "test", "index": 500}).status_code == 400
        assert client.post("/catch/tasks", json={"split": "nope"}).status_code == 400
        assert client.post("/other/tasks", json={"split": "test"}).status_code == 404
        picked = client.post("/reset", json={"split": "test", "index": 7}).json()
        assert picked["observation"]["text"].startswith("ball 2 ")
        assert client.get("/state").json()["index"] == 7


def test_rows_that_are_only_counted_or_passed_over_are_not_made_json() -> None:
    class Pictured(Env):
        """Its first row names an image whose file is gone, which no answer can hold."""

        inline = True

        def tasks(self, split: str) -> list[dict[str, object]]:
            return [{"board": {"type": "image", "sha256": "0" * 64, "media_type": "image/png"}}, {"n": 1}]

        def reset(self, task: object) -> str:
            return "go"

        def step(self, reply: str) -> Step:
            return Step("")

    with running(as_app(Pictured)) as server, httpx.Client(base_url=f"{server.url}/Pictured") as client:
        train = {"split": "train"}
        assert client.post("/num_tasks", json=train).json() == {"num_tasks": 2}
        assert client.post("/task", json={**train, "index": 1}).json()["task"]["task"] == {"n": 1}
        some = client.post("/task_range", json={**train, "start": 1}).json()["tasks"]
        assert [row["index"] for row in some] == [1]
        assert client.post("/tasks", json=train).status_code == 500


def test_what_was_shown_is_forgotten_and_what_tasks_name_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    store = images.ImageStore(memory=1)
    monkeypatch.setattr(images, "STORE", store)
    monkeypatch.setattr(app, "IMAGES_ON_DISK", 4000)
    shades = iter(range(256))

    def noise() -> Image.Image:
        return Image.effect_noise((32, 32), next(shades) / 2 + 1)  # About a kilobyte.

    class Gallery(Env):
        def tasks(self, split: str) -> list[dict[str, object]]:
            return [{"picture": images.as_json(noise())} for _ in range(4)]

        def reset(self, task: dict[str, Image.Image]) -> list[object]:
            return ["Look:", task["picture"]]

        @tool
        def another(self) -> Image.Image:
            """See another."""
            return noise()

    act = {"action": {"type": "call_tool", "tool_name": "another", "arguments": {}}}
    with running(as_app(Gallery)) as server, httpx.Client(base_url=server.url) as client:
        for index in (0, 1, 2, 3, 0):
            seen = client.post("/reset", json={"split": "train", "index": index}).json()
            assert "image_url" in str(seen["observation"]["messages"])
            for _ in range(8):
                assert client.post("/step", json=act).json()["metadata"]["content"]
        assert store._overflow is not None
        kept = sum(file.stat().st_size for file in Path(store._overflow.name).iterdir())
    assert 3000 < kept < 16_000  # Of some 50 KB: the bound, and the rows of both splits.


def test_the_task_api_of_an_environment_without_tasks(client: httpx.Client) -> None:
    assert client.get("/Counter/splits").status_code == 501
    assert client.get("/list_environments").json() == []


def test_production_has_no_controls() -> None:
    with running(as_app("catch", Settings(mode="production"))) as server:
        assert httpx.post(f"{server.url}/reset").status_code in (404, 405)
        assert httpx.post(f"{server.url}/catch/tasks", json={"split": "test"}).status_code in (404, 405)
        assert httpx.get(f"{server.url}/health").status_code == 200
