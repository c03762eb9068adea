"""On our own server an environment is what it is here: episodes are alike to the last field of each call."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
from PIL import Image
from tests.openenv.serving import as_app, running

from turnwise.envs.base import Env, tool
from turnwise.envs.registry import make
from turnwise.envs.session import EnvSpec, Session
from turnwise.errors import EnvError, EnvHungError, EnvLostError, EnvSpecError, ScoringError
from turnwise.openenv.client.peer import PeerSession
from turnwise.openenv.hosted import hosted
from turnwise.openenv.server.settings import Settings
from turnwise.types import ImageBlock, Message, Step, TextBlock, ToolCall


class Fair(Env):
    """Everything that an environment may do."""

    inline = True
    system = "Win something."
    max_turns = 6
    max_tool_calls = 9
    forfeit = -2.0
    tickets: ClassVar[dict[str, int]] = {"red": 1, "blue": 2}

    def tasks(self, split: str) -> Any:
        if split == "train":
            yield {"colour": "red", "nested": [1, {"a": None}]}
            yield {"colour": "blue"}

    def reset(self, task: Any) -> Any:
        self.colour, self.calls, self.task = task["colour"], 0, task
        return [
            Message.user(f"{self.colour} {self.rng.random()}"),
            Message.assistant("hm"),
            Message.user("Go."),
        ]

    @tool
    def draw(self, item: str, size: Literal["big", "small"] = "small") -> Any:
        """Draw a ticket."""
        self.calls += 1
        return {"item": item, "size": size, "worth": self.tickets[item]}

    @tool
    def pay(self) -> Step:
        """Get a little."""
        return Step("here", reward=0.25, info={"coins": 3})

    @tool
    def show(self) -> Any:
        """See."""
        return ["look:", Image.new("RGB", (3, 2), (255, 0, 0))]

    @tool
    def win(self) -> Step:
        """End it."""
        return Step("won", reward=1.0, terminated=True)

    @tool
    def tire(self) -> Step:
        """Run out."""
        return Step("tired", truncated=True)

    @tool
    def lose(self) -> str:
        """Lose something."""
        raise EnvLostError("gone")

    @tool
    async def wait(self, seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "waited"

    def step(self, reply: str) -> Step:
        if reply == "many":
            return Step([Message.user("one"), Message.user("two")], reward=0.5)
        if reply == "nothing":
            return Step()
        if reply == "oops":
            raise ValueError("no such reply")
        return Step(f"heard {reply}", info={"length": len(reply)})

    def reward(self) -> dict[str, float | None]:
        if self.calls > 2:
            raise ValueError("too many")
        return {"calls": float(self.calls), "luck": None}

    def teacher(self, messages: Any) -> Message:
        return Message.assistant(f"{len(messages)} so far", ToolCall(name="win", arguments={}, id="t1"))

    def state_key(self) -> str:
        return f"{self.colour}/{self.calls}"


def act(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments, id=f"id-{name}")


EPISODES: dict[str, list[ToolCall | str]] = {
    "calls": [
        act("draw", item="red"), act("draw", item="blue", size="big"), act("draw", item=3),
        act("draw", item="red", size="huge"), act("darw"), act("pay"), act("show"), act("win"),
    ],
    "replies": ["hello", "many", "nothing", "oops", act("tire")],
    "scoring": [act("draw", item="red"), act("draw", item="red"), act("draw", item="red"), act("win")],
    "unended": [act("draw", item="red"), "hello"],
    "unread": [ToolCall(name="draw", arguments={}, error="no JSON", raw="{"), act("win")],
}  # fmt: skip


async def diary(spec: EnvSpec, acts: list[ToolCall | str], seed: int) -> list[Any]:
    """Everything that a session says in an episode."""
    session = await spec.open(spec.limits)
    out: list[Any] = [session.tools, session.system, session.has_step]
    try:
        task = list(spec.tasks("train"))[seed % 2]
        messages = await session.reset(task, seed)
        out += [task, messages]
        for one in acts:
            out.append(await session.state_key())
            if isinstance(one, str):
                out.append(await session.step(Message.assistant(one)))
            else:
                result = replace(await session.call(one), seconds=0.0)
                out.append(result)
        out.append(await session.teacher(messages))
        try:
            out.append(await session.reward())
        except ScoringError as error:
            out.append(str(error))
    finally:
        await session.close()
    return out


@pytest.fixture(scope="module")
def url() -> Any:
    with running(as_app(Fair)) as server:
        yield server.url


@pytest.mark.parametrize("name", EPISODES)
@pytest.mark.parametrize("seed", [1, 2])
def test_episodes_are_the_same(url: str, name: str, seed: int) -> None:
    here, there = (asyncio.run(diary(spec, EPISODES[name], seed)) for spec in (make(Fair), make(url)))
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert one == other


def test_what_a_spec_says(url: str) -> None:
    here, there = make(Fair), make(url)
    assert (there.name, there.limits, there.forfeit) == ("Fair", here.limits, -2.0)
    assert list(there.tasks("train")) == list(here.tasks("train"))


def test_images_cross_whole(url: str) -> None:
    async def main() -> Any:
        spec = make(url)
        session = await spec.open(spec.limits)
        await session.reset({"colour": "red"}, 0)
        content = (await session.call(act("show"))).content
        await session.close()
        return content

    text, image = asyncio.run(main())
    assert text == TextBlock(text="look:") and isinstance(image, ImageBlock)


def test_a_loss_there_is_a_loss_here(url: str) -> None:
    async def main() -> None:
        spec = make(url)
        session = await spec.open(spec.limits)
        await session.reset({"colour": "red"}, 0)
        with pytest.raises(EnvLostError, match="gone"):
            await session.call(act("lose"))
        await session.close()

    asyncio.run(main())


def test_a_tool_that_is_too_slow_is_told_by_the_server_and_the_episode_goes_on() -> None:
    served = hosted(Fair)
    served.limits = replace(served.limits, call_seconds=0.8)

    async def main(url: str) -> None:
        spec = make(url)
        session = await spec.open(replace(spec.limits, call_seconds=0.8))
        await session.reset({"colour": "red"}, 0)
        result = await session.call(act("wait", seconds=20.0))
        assert result.error == "timeout" and session.alive
        assert (await session.call(act("pay"))).content == "here"
        await session.close()

    with running(as_app(served)) as server:
        asyncio.run(main(server.url))


def test_a_deadline_of_this_side(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeerSession, "margin", 0.0)
    monkeypatch.setattr("turnwise.openenv.client.session.PONG_SECONDS", 30.0)

    async def main() -> None:
        spec = make(url)
        session = await spec.open(replace(spec.limits, call_seconds=4.0))
        await session.reset({"colour": "red"}, 0)
        with pytest.raises(EnvHungError):
            await session.call(act("wait", seconds=29.0))
        assert not session.alive
        assert (await session.reset({"colour": "blue"}, 0))[0].text.startswith("blue")
        assert (await session.call(act("pay"))).content == "here"
        await session.close()

    asyncio.run(main())


def test_a_row_that_names_nothing_leaves_the_choice_to_the_server(url: str) -> None:
    async def main() -> None:
        spec = make(url)
        session = await spec.open(spec.limits)
        assert (await session.reset({}, 1))[0].text.startswith("blue")
        await session.close()

    asyncio.run(main())


def test_args_are_the_servers_own(url: str) -> None:
    with pytest.raises(EnvSpecError, match=r"args.show does nothing with a Turnwise server"):
        make(url, args={"show": "text"})


def test_a_token() -> None:
    with running(as_app(Fair, Settings(token="open sesame"))) as server:
        for args in ({}, {"token": "shut"}):
            with pytest.raises(EnvSpecError, match=r"HTTP 401: it wants a token, .* args.token in a recipe"):
                make(server.url, args=args)

        async def main() -> None:
            spec = make(server.url, args={"token": "open sesame"})
            assert len(list(spec.tasks("train"))) == 2
            await (await spec.open(spec.limits)).close()

        asyncio.run(main())


@pytest.mark.parametrize("way", [429, 503, "lost"])
def test_rows_are_listed_by_the_next_server_where_one_cannot(way: int | str) -> None:
    class Failing:
        """Lists nothing, for now."""

        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if not scope.get("path", "").endswith("/tasks"):
                await self.app(scope, receive, send)
            elif way == "lost":
                raise ConnectionResetError
            else:
                await send({"type": "http.response.start", "status": way, "headers": []})
                await send({"type": "http.response.body", "body": b""})

    with running(Failing(as_app(Fair))) as failing, running(as_app(Fair)) as well:
        assert len(list(make([failing.url, well.url]).tasks("train"))) == 2
        with pytest.raises(EnvLostError, match=f"no server answers: {failing.url}"):
            list(make(failing.url).tasks("train"))


def test_places_are_waited_for_and_handed_on() -> None:
    """More episodes than places: the server has some wait, and a session between two gives its place up."""

    async def main(url: str, queue: str) -> None:
        spec = make(url)
        held: list[Session] = [await spec.open(spec.limits) for _ in range(2)]
        third = asyncio.ensure_future(spec.open(spec.limits))
        await asyncio.sleep(0.5)
        assert not third.done()
        await held[0].close()
        held[0] = await asyncio.wait_for(third, 30)
        await held[0].reset({"colour": "red"}, 0)
        # Nobody closes anything now, but one rests.
        fourth = asyncio.ensure_future(spec.open(spec.limits))
        await asyncio.sleep(0.4)
        assert not fourth.done(), queue
        await held[1].reset({"colour": "red"}, 0)
        await held[1].reward()
        taker = await asyncio.wait_for(fourth, 30)
        assert not held[1].alive and taker.alive
        assert (await taker.reset({"colour": "blue"}, 0))[0].text.startswith("blue")
        await asyncio.gather(*(one.close() for one in (*held, taker)))

    for queue in (0, 64):
        with running(as_app(Fair, Settings(max_sessions=2, queue=queue))) as server:
            asyncio.run(main(server.url, f"queue {queue}"))


def test_no_teacher_elsewhere(url: str) -> None:
    from tests.openenv import foreign

    async def main(url: str) -> None:
        spec = make(url)
        session = await spec.open(spec.limits)
        with pytest.raises(EnvError, match="has no teacher: its server is no Turnwise server"):
            await session.teacher([])
        await session.close()

    with running(foreign.guess_app()) as server:
        asyncio.run(main(server.url))
