"""Servers that `openenv.core` runs, played as environments of ours: tools, what is shown, what is refused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.openenv import foreign
from tests.openenv.containers import until
from tests.openenv.ports import reserved
from tests.openenv.serving import Serving, as_app, running

import turnwise
from turnwise.envs.registry import make
from turnwise.envs.session import Session
from turnwise.errors import ActionError, EnvError, EnvHungError, EnvSpecError
from turnwise.openenv.client import balance, remote
from turnwise.openenv.client.actions import action_schema, typed_action, typed_actions
from turnwise.openenv.client.observation import Reader
from turnwise.openenv.client.options import Options
from turnwise.openenv.client.remote import RemoteSpec, discover
from turnwise.openenv.client.session import RemoteSession
from turnwise.openenv.server.create import create_app
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.typed import TypedEnv
from turnwise.types import Message, Step, ToolCall


@pytest.fixture(scope="module")
def guess() -> Iterator[Serving]:
    with running(foreign.guess_app()) as server:
        yield server


@pytest.fixture(scope="module")
def shop() -> Iterator[Serving]:
    with running(foreign.shop_app()) as server:
        yield server


@pytest.fixture(scope="module")
def chatter() -> Iterator[Serving]:
    with running(foreign.chatter_app()) as server:
        yield server


def spec_of(server: Serving | list[str], **args: Any) -> RemoteSpec:
    spec = make(server if isinstance(server, list) else server.url, args=args)
    assert isinstance(spec, RemoteSpec)
    return spec


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def played(spec: RemoteSpec, *acts: ToolCall | str, seed: int = 3, task: Any = None) -> list[Any]:
    """The first messages, then what each act is answered with."""

    async def main() -> list[Any]:
        session = await spec.open(spec.limits)
        try:
            first = await session.reset(task or {}, seed)
            return [first, *[await _answer(session, act) for act in acts]]
        finally:
            await session.close()

    return asyncio.run(main())


async def _answer(session: Session, act: ToolCall | str) -> Any:
    return await (session.step(Message.assistant(act)) if isinstance(act, str) else session.call(act))


# -- typed actions --------------------------------------------------------------------------------------


def test_an_action_by_reference_is_what_it_names_and_no_schema_is_told() -> None:
    fields = {"title": "MoveAction", "properties": {"column": {"type": "integer"}}, "required": ["column"]}
    found = action_schema({"$ref": "#/$defs/MoveAction", "$defs": {"MoveAction": fields}}, "http://there")
    assert typed_action(found, "http://there").schema.name == "move"
    for wrong in ([], None, {"properties": []}, {"properties": {"a": 1}}, {"required": 3}, {"$defs": 1}):
        with pytest.raises(EnvSpecError, match=r"http://there/schema: .*no JSON schema"):
            action_schema(wrong, "http://there")


def test_a_typed_action_becomes_one_tool(guess: Serving) -> None:
    [tool] = spec_of(guess).tools
    assert (tool.name, tool.description) == ("guess", "Say a number.")
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "number": {"type": "integer", "minimum": 0, "maximum": 9, "description": "The guess."},
            "mood": {"type": "string", "enum": ["calm", "bold"], "default": "calm"},
        },
        "required": ["number"],
        "additionalProperties": False,
    }


@pytest.fixture(scope="module", params=["theirs", "ours"])
def stones(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """An environment whose action is a discriminated union, behind their server and behind ours."""
    ours = TypedEnv(foreign.Stones, foreign.StonesAction, foreign.StonesObservation)
    with running(foreign.stones_app() if request.param == "theirs" else as_app(ours)) as server:
        yield server


def test_an_action_that_is_one_of_several_becomes_a_tool_for_each(stones: Serving) -> None:
    spec = spec_of(stones)
    put, undo = spec.tools
    assert (put.name, put.description) == ("put", "Put a stone on an empty place.")
    assert put.parameters["properties"] == {"at": {"$ref": "#/$defs/Place"}}
    assert (put.parameters["required"], list(put.parameters["$defs"])) == (["at"], ["Place"])
    assert (undo.name, undo.parameters["properties"]) == ("undo", {})
    corner, edge = {"row": 0, "column": 0}, {"row": 0, "column": 1}
    acts = [
        call("put", at=corner),
        call("put", at=edge),
        call("undo"),
        call("put", at={"row": 9, "column": 0}),
    ]
    _, *seen = played(spec, *acts)
    assert [json.loads(one.content) for one in seen[:3]] == [[[0, 0]], [[0, 0], [0, 1]], [[0, 0]]]
    assert [one.step.reward for one in seen[:3]] == [1.0] * 3 and seen[3].error == "bad_arguments"


def test_an_action_that_is_one_of_several_may_be_given_whole(stones: Serving) -> None:
    with turnwise.connect(stones.url).sync() as env:
        env.reset(seed=1)
        put = {"kind": "put", "at": {"row": 1, "column": 1}}
        assert json.loads(str(env.step(put).observation)) == [[1, 1]]
        assert json.loads(str(env.step(put).observation)) == [[1, 1], [1, 1]]
        assert json.loads(str(env.step({"kind": "undo"}).observation)) == [[1, 1]]
        with pytest.raises(ActionError, match=r"{'kind': 'put'} or {'kind': 'undo'}"):
            env.step({"kind": "burn"})


@pytest.mark.parametrize(
    ("union", "told"),
    [
        ([{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A2"}], "two of one name: go, go"),
        ([{"$ref": "#/$defs/Call"}], "none that is no MCP tool call"),
        ([{"$ref": "#/$defs/Round"}], "none that is no MCP tool call"),
        ([{"type": "null"}], "no fields"),
    ],
)
def test_members_that_make_no_tools_are_told(union: list[Any], told: str) -> None:
    go = {"title": "GoAction", "properties": {"n": {"type": "integer"}}}
    call = {"title": "CallToolAction", "properties": {"tool_name": {}, "arguments": {}}}
    defs = {"A": go, "A2": go, "Call": call, "Round": {"anyOf": [{"$ref": "#/$defs/Round"}]}}
    action = action_schema({"oneOf": union, "$defs": defs}, "http://there")
    with pytest.raises(EnvSpecError, match=told):
        typed_actions(action, "http://there")
    with pytest.raises(EnvSpecError, match="no JSON schema"):
        action_schema({"anyOf": [{"title": "Odd", "properties": {"a": 1}}]}, "http://there")


def test_an_episode(guess: Serving) -> None:
    first, low, right = played(spec_of(guess), call("guess", number=1), call("guess", number=3))
    assert first == (Message.user("Guess a number from 0 to 9."),)
    assert (low.content, low.error, low.step) == ("higher", None, Step("higher", reward=0.0))
    assert right.step == Step("right", reward=1.0, terminated=True)


def test_what_resets_take(guess: Serving) -> None:
    spec = spec_of(guess, reset={"low": 4})
    first, _ = played(spec, call("guess", number=4), seed=0)
    assert first[0].text == "Guess a number from 4 to 9."
    assert played(spec, task={"low": 2, "unheard": "of"})[0][0].text == "Guess a number from 2 to 9."


@pytest.mark.parametrize(
    ("made", "error", "told"),
    [
        (
            call("guess"),
            "bad_arguments",
            "guess: number is missing; expected an integer at least 0 at most 9.",
        ),
        (call("guess", number=10), "bad_arguments", "found 10 (an integer)"),
        (call("guess", number=1, mood="sad"), "bad_arguments", 'expected one of "calm", "bold"; found "sad"'),
        (call("guess", number=1, kind="guess"), "bad_arguments", "kind is no parameter"),
        (call("gess", number=1), "unknown_tool", "There is no tool 'gess'. Available: guess."),
        (
            ToolCall(name="guess", arguments={}, error="no JSON", raw="{"),
            "malformed",
            "The tool call could not be read: no JSON. The form is guess(number: an integer",
        ),
    ],
)
def test_a_wrong_call_never_reaches_the_server(guess: Serving, made: ToolCall, error: str, told: str) -> None:
    async def main() -> None:
        spec = spec_of(guess)
        session = await spec.open(spec.limits)
        await session.reset({}, 3)
        result = await session.call(made)
        assert result.error == error and told in str(result.content) and result.step is None
        assert (await session.state())["step_count"] == 0  # type: ignore[attr-defined]
        await session.close()

    asyncio.run(main())


def test_what_the_environment_raises_is_told(guess: Serving) -> None:
    _, failed, after = played(spec_of(guess), call("guess", number=9, mood="bold"), call("guess", number=3))
    assert (failed.error, failed.content) == ("raised", "guess failed: nine is too bold")
    assert after.step.terminated


# -- MCP tools ------------------------------------------------------------------------------------------


def test_mcp_tools(shop: Serving) -> None:
    spec = spec_of(shop)
    assert {tool.name: tool.parameters["required"] for tool in spec.tools} == {
        "price": ["item"],
        "describe": ["item"],
        "nap": ["seconds"],
    }
    assert spec.tools[0].parameters["properties"]["count"] == {"type": "integer", "default": 1}
    first, price, said, broken, wrong = played(
        spec,
        call("price", item="tea", count=2),
        call("describe", item="jam"),
        call("price", item="oil"),
        call("price", count="two", item="tea"),
    )
    assert first == (Message.user("Shop environment"),)  # Its reset says nothing.
    assert (price.content, price.error) == ("6", None)
    assert said.content == "It is jam."
    assert broken.error == "raised" and "'oil'" in broken.content
    assert wrong.error == "bad_arguments" and "count: expected an integer" in wrong.content


# -- what is shown --------------------------------------------------------------------------------------


def test_fields_and_differences(chatter: Serving) -> None:
    whole, _ = played(spec_of(chatter), call("say", message="hi"))
    assert whole[0].text.startswith('{"prompt":"You chat.","messages":[{"sender_id":-1')
    first, step = played(spec_of(chatter, show="messages"), call("say", message="hi"))
    assert (first[0].text, step.content) == ("Say anything.", "Say anything.\nhi\nYou said hi.")
    first, *steps = played(
        spec_of(chatter, show=["prompt", "messages"], cumulative=True),
        call("say", message="hi"),
        call("say", message="ho"),
    )
    assert first[0].text == "You chat.\nSay anything."
    assert [step.content for step in steps] == ["hi\nYou said hi.", "ho\nYou said ho."]


def test_replies_as_actions(chatter: Serving) -> None:
    spec = spec_of(chatter, reply="message", show="messages", cumulative=True)
    assert spec.tools == ()
    _, step, empty = played(spec, "hi", "")
    assert step == Step("hi\nYou said hi.", reward=0.5)
    assert empty.info == {"error": "bad_arguments"} and "at least 1 characters" in empty.observation


def test_a_second_episode_begins_anew(chatter: Serving) -> None:
    async def main() -> list[str]:
        spec = spec_of(chatter, show="messages", cumulative=True)
        session = await spec.open(spec.limits)
        said = []
        for acts in (1, 0, 0):
            said.append((await session.reset({}, 0))[0].text)
            for _ in range(acts):
                await session.call(call("say", message="hi"))
            assert await session.reward() == {}
        await session.close()
        return said

    assert asyncio.run(main()) == ["Say anything."] * 3


# -- specs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"shwo": "text"}, "args.shwo: a server has no such argument; did you mean 'show'"),
        ({"low": 3}, "what its reset takes is written args.reset.low"),
        ({"patience": 0}, "args.patience: Input should be greater than 0; found 0"),
        ({"reply": "words"}, "args.reply: the action has no field 'words'; it has number, mood"),
        ({"reply": "mood"}, "args.reply: a reply is 'mood' alone, and actions need number too"),
        (
            {"token": "$TURNWISE_NO_SUCH"},
            "args.token: the environment variable \\$TURNWISE_NO_SUCH is not set",
        ),
        ({"headers": {"X": "a $TURNWISE_NO_SUCH"}}, "args.headers.X: the environment variable .* is not set"),
    ],
)
def test_wrong_args(guess: Serving, args: dict[str, Any], problem: str) -> None:
    with pytest.raises(EnvSpecError, match=problem):
        spec_of(guess, **args)


def test_a_field_that_is_not_there(guess: Serving) -> None:
    with pytest.raises(
        EnvSpecError, match=r"args.show: the observation has no field 'board'; it has text, left"
    ):
        spec_of(guess, show=["text", "board"])


def test_a_field_that_an_observation_lacks() -> None:
    """Which no schema told of before."""
    with pytest.raises(EnvError, match=r"no field 'board', which args.show names; it has text, left"):
        Reader(("board",), cumulative=False, what="it").read({"text": "", "left": 1}, None)


class Untold:
    """A server whose schemas cannot be made, as of an observation that holds an array."""

    def __init__(self, app: Any, status: int = 500) -> None:
        self.app, self.status = app, status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/schema":
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})


def test_a_server_that_tells_no_schema_is_played_by_its_tools_or_by_replies(shop: Serving) -> None:
    with running(Untold(foreign.shop_app())) as server:
        spec = spec_of(server)
        assert [tool.name for tool in spec.tools] == [tool.name for tool in spec_of(shop).tools]
    with running(Untold(foreign.chatter_app())) as server:
        told = played(spec_of(server, reply="message", show="messages", cumulative=True), "hi")
        assert "hi" in str(told[1].observation)
        began = time.monotonic()
        with pytest.raises(
            EnvSpecError, match=r"GET /schema: HTTP 500, and it lists no MCP tools.*args.reply"
        ):
            spec_of(server)
        assert time.monotonic() - began < 5, "it is no matter of patience"
    with running(Untold(foreign.chatter_app(), 503)) as server, pytest.raises(EnvSpecError, match="HTTP 503"):
        spec_of(server, patience=0.2)


@pytest.mark.parametrize("env", ["catch", foreign.Guess])
def test_what_agents_alone_may_play_is_told_before_an_episode(env: Any) -> None:
    settings = Settings(mode="production")
    app = create_app(env, mode="production") if env is foreign.Guess else as_app(env, settings)
    with running(app) as server, pytest.raises(EnvSpecError, match="production mode"):
        spec_of(server, patience=0.2)


def test_fingerprints_follow_what_is_shown_and_not_the_address(guess: Serving, chatter: Serving) -> None:
    with running(foreign.guess_app()) as other:
        assert spec_of(guess).fingerprint == spec_of(other).fingerprint
    prints = {
        spec_of(guess).fingerprint,
        spec_of(guess, reset={"low": 1}).fingerprint,
        spec_of(guess, show="text").fingerprint,
        spec_of(chatter).fingerprint,
    }
    assert len(prints) == 4
    assert spec_of(guess, headers={"X": "1"}, patience=5.0).fingerprint in prints


def test_secrets_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWISE_A_KEY", "s3cret")
    options = Options(
        token="$TURNWISE_A_KEY", headers={"X-Key": "$TURNWISE_A_KEY", "Y": "k=$TURNWISE_A_KEY; $1"}
    )
    assert options.request_headers == {
        "X-Key": "s3cret", "Y": "k=s3cret; $1", "Authorization": "Bearer s3cret",
    }  # fmt: skip


def test_no_server() -> None:
    with pytest.raises(EnvSpecError, match=r"no server answers at http://127.0.0.1:9 .*turnwise env serve"):
        make("http://127.0.0.1:9", args={"patience": 0.1})


def test_servers_that_differ(guess: Serving, chatter: Serving) -> None:
    with pytest.raises(EnvSpecError, match=r"serves .Guess. and .* serves .Chatter."):
        make([guess.url, chatter.url])


# -- deadlines ------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """What hangs does so until it is freed, also while this machine pauses; a ping's answer may wait."""
    monkeypatch.setattr("turnwise.openenv.client.session.PONG_SECONDS", 30.0)
    foreign.Slow.free.clear()
    with running(foreign.slow_app()) as server:
        try:
            yield server
        finally:
            foreign.Slow.free.set()


def test_a_hung_call_is_never_answered_by_the_next(slow: Serving) -> None:
    """The reply that comes late is dropped, and the next episode has a connection of its own."""

    async def main() -> None:
        spec = spec_of(slow)
        session = await spec.open(replace(spec.limits, call_seconds=4.0))
        await session.reset({}, 7)
        with pytest.raises(EnvHungError, match=r"no answer to step within 4 s"):
            await session.call(call("slow", number=-30))
        assert not session.alive
        assert (await session.reset({}, 5))[0].text == "5"
        assert session.alive
        foreign.Slow.free.set()
        result = await session.call(call("slow", number=20))
        assert result.step == Step("20", reward=20.0)
        await session.close()

    asyncio.run(main())


def test_what_is_cancelled_is_never_answered_by_the_next(slow: Serving) -> None:
    async def main() -> None:
        spec = spec_of(slow)
        session = await spec.open(spec.limits)
        await session.reset({}, 7)
        calling = asyncio.ensure_future(session.call(call("slow", number=-30)))
        await asyncio.sleep(0.05)
        calling.cancel()
        await asyncio.wait((calling,))
        assert not session.alive
        foreign.Slow.free.set()
        # Even on the same connection the reply would be dropped: the line keeps its place.
        result = await session.call(call("slow", number=30))
        assert result.step == Step("30", reward=30.0)
        assert session.alive
        await session.close()

    asyncio.run(main())


def test_sessions_are_closed_on_the_server() -> None:
    with running(foreign.guess_app()) as server:
        spec = spec_of(server)
        before = len(foreign.Guess.made)

        async def main() -> None:
            sessions: list[Session] = await asyncio.gather(*(spec.open(spec.limits) for _ in range(20)))
            await asyncio.gather(*(session.close() for session in sessions))
            await sessions[0].close()
            assert spec.remote.servers.busy == {server.url: 0}

        asyncio.run(main())
        made = foreign.Guess.made[before:]
        assert len(made) == 20
        until(lambda: all(one.closed for one in made))


def test_sessions_are_spread_over_servers(guess: Serving) -> None:
    """The least busy gets the next; one that is gone is set aside, and its share goes to the others."""

    async def main(urls: list[str]) -> None:
        spec = spec_of(urls)
        busy = spec.remote.servers.busy
        sessions = await asyncio.gather(*(spec.open(spec.limits) for _ in range(6)))
        assert spec.remote.servers.busy == dict.fromkeys(busy, 3)
        await asyncio.gather(*(one.close() for one in sessions[:2]))
        sessions = [*sessions[2:], *await asyncio.gather(*(spec.open(spec.limits) for _ in range(4)))]
        assert spec.remote.servers.busy == dict.fromkeys(busy, 4)
        await asyncio.gather(*(one.close() for one in sessions))

    async def with_one_gone(urls: list[str]) -> None:
        spec = spec_of(urls)
        sessions = await asyncio.gather(*(spec.open(spec.limits) for _ in range(4)))
        assert spec.remote.servers.busy == {urls[0]: 4, urls[1]: 0}
        await asyncio.gather(*(one.close() for one in sessions))

    with running(foreign.guess_app()) as other:
        asyncio.run(main([guess.url, other.url]))
    asyncio.run(with_one_gone([guess.url, other.url]))


def test_a_place_is_waited_for() -> None:
    """Twelve episodes, one after another where there is one place only; nothing fails."""
    with running(foreign.guess_app(most=1)) as server:

        async def episode(spec: RemoteSpec, seed: int) -> None:
            session = await spec.open(spec.limits)
            await session.reset({}, seed)
            assert (await session.call(call("guess", number=seed % 10))).step == Step(
                "right", reward=1.0, terminated=True
            )
            await session.reward()
            if seed % 2:
                await session.close()

        async def main() -> None:
            spec = spec_of(server)
            await asyncio.gather(*(episode(spec, seed) for seed in range(12)))

        asyncio.run(main())


def test_two_environments_on_one_server_hand_places_to_each_other() -> None:
    with running(foreign.guess_app(most=1)) as server:

        async def main() -> None:
            first, second = [await discover(server.url, name, {}) for name in ("first", "second")]
            rests = await first.open(first.limits)
            await rests.reset({}, 1)
            await rests.reward()
            async with asyncio.timeout(30):
                plays = await second.open(second.limits)
                await plays.reset({}, 2)
                await plays.reward()
                assert (await rests.reset({}, 3))[0].text.startswith("Guess")
            await asyncio.gather(plays.close(), rests.close())

        asyncio.run(main())


def test_who_waits_for_a_full_server_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(foreign.guess_app(most=1)) as server:

        async def main() -> None:
            spec = await discover(server.url, "one", {})
            held = await spec.open(spec.limits)
            waiting = asyncio.ensure_future(spec.open(spec.limits))
            while not spec.remote.servers._servers[0].said:  # Before which there is no word yet.
                await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait((waiting,))
            monkeypatch.setattr(balance, "TOLD_AFTER", 0.3)
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.8):
                        await spec.open(spec.limits)
            monkeypatch.setattr(remote, "LISTING_SECONDS", 1.0)
            with pytest.raises(
                EnvSpecError, match=r"no place came free to ask for the tools.*max_concurrent"
            ):
                await discover(server.url, "two", {"patience": 0.5})
            await held.close()

        asyncio.run(main())
    [told] = [one.getMessage() for one in caplog.records if one.name == balance.log.name]
    assert "environment one: no session after 0.3 s" in told and f"{server.url}: " in told
    assert "max_concurrent_envs" in told and "no word yet" not in told


def test_connections_that_go_while_idle_are_no_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(foreign.guess_app()) as server:

        async def main() -> None:
            spec = await discover(server.url, None, {})
            sessions = [await spec.open(spec.limits) for _ in range(16)]
            for session in sessions:
                assert isinstance(session, RemoteSession) and session._socket is not None
                session._socket.abort()
            while any(session.alive for session in sessions):
                await asyncio.sleep(0.01)
            await asyncio.gather(*(session.close() for session in sessions))
            [state] = spec.remote.servers._servers
            assert state.failures == 0 and state.aside_until == 0.0
            monkeypatch.setattr(balance, "monotonic", lambda: 1.0)  # In one moment.
            for _ in range(16):
                state.failed()
            assert state.failures == 1, "tries that fail together count once"

        asyncio.run(main())


def test_a_place_is_free_again_also_where_its_closing_is_cancelled(guess: Serving) -> None:
    async def main() -> None:
        spec = await discover(guess.url, None, {})
        servers = spec.remote.servers
        one = await servers.open(5, patience=5, what="one")
        assert list(servers.busy.values()) == [1]
        closing = servers.release(one)
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        assert closing.cancelled() and list(servers.busy.values()) == [0]
        await one.close()

    asyncio.run(main())


def test_a_server_that_comes_late_is_compared_with_the_others(guess: Serving) -> None:
    async def main(late: int) -> None:
        spec = await discover([guess.url, f"http://127.0.0.1:{late}"], None, {"patience": 1.0})
        held = [await spec.open(spec.limits) for _ in range(2)]
        with running(foreign.chatter_app(), port=late):
            await asyncio.sleep(0.5)  # Past the first pause.
            more = [await spec.open(spec.limits) for _ in range(2)]
            busy = spec.remote.servers.busy
            assert list(busy.values()) == [4, 0], "it serves something else"
            await asyncio.gather(*(one.close() for one in [*held, *more]))

    with reserved() as late:
        asyncio.run(main(late))
