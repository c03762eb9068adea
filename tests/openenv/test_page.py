"""The page at /web in Chromium: episodes by hand on real servers, environments of ours and OpenEnv's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from playwright.sync_api import (
    BrowserContext,
    ConsoleMessage,
    FrameLocator,
    Page,
    Playwright,
    expect,
    sync_playwright,
)
from pydantic import Field
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Mount, Route
from tests.openenv.containers import until
from tests.openenv.serving import Serving, as_app, running

from turnwise import images
from turnwise.envs import Env, Step, tool
from turnwise.openenv import models
from turnwise.openenv.server.settings import Settings
from turnwise.openenv.typed import TypedEnv

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("TURNWISE_CHROMIUM") != "1",
    reason="no Chromium here: apt-get install chromium; with TURNWISE_CHROMIUM=1 this fails",
)
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


class Zoo(Env):
    """Every kind of parameter."""

    system = "You look after the animals."

    def reset(self, task):
        return f"Welcome. {HOSTILE}"

    def step(self, reply: str) -> Step:
        return Step(f"You said: {reply}", reward=-0.25, terminated="bye" in reply)

    def reward(self) -> dict[str, float | None]:
        return {"kindness": 1.5, "speed": None}

    @tool
    def feed(
        self, animal: Literal["lion", "otter"], kilos: float, gently: bool, notes: list[str] | None = None
    ) -> str:
        """Feed an animal."""
        return json.dumps([animal, kilos, gently, notes])

    @tool
    def look(self) -> list[Any]:
        """Look around."""
        from PIL import Image

        return [images.put(Image.new("RGB", (40, 30), "red"))]

    @tool
    async def sleep(self, seconds: int) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "awake"


class GridAction(models.Action):
    direction: Literal["UP", "DOWN"]
    column: int = Field(ge=0, lt=7, description="Where to.")
    force: float | None = None


class GridObservation(models.Observation):
    board: list[list[int]]
    pixels: list[list[list[int]]] | None = None
    history: str = ""


class GridState(models.State):
    column: int = 0


class Grid:
    """Written for OpenEnv."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> GridObservation:
        self.state = GridState(episode_id=episode_id, step_count=0)
        return GridObservation(board=[[0] * 7])

    def step(self, action: GridAction, timeout_s: float | None = None, **_: Any) -> GridObservation:
        self.state = GridState(step_count=self.state.step_count + 1, column=action.column)
        row = [int(column == action.column) for column in range(7)]
        pixels = (
            [[[row, column, 255] for column in range(84)] for row in range(84)] if action.column else None
        )
        return GridObservation(
            board=[row],
            pixels=pixels,
            history="".join(f"turn {turn}\n" for turn in range(1, 100)) if action.column else "",
            reward=action.force,
            done=action.direction == "DOWN",
        )

    def close(self) -> None: ...


ARGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    context = playwright.chromium.launch_persistent_context(
        tmp_path_factory.mktemp("profile"),
        executable_path=CHROMIUM,
        args=ARGS,
        viewport={"width": 1280, "height": 800},
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(20_000)
    yield context
    context.close()


Play = Callable[..., tuple[Page, Serving]]


@pytest.fixture
def play(browser: BrowserContext) -> Iterator[Play]:
    """The page of a server of its own; no script may fail on it, and nobody else may be asked anything."""
    with ExitStack() as stack:
        pages: list[tuple[Page, Serving, list[str]]] = []

        def opened(app: Any, path: str = "/web", **settings: Any) -> tuple[Page, Serving]:
            server = stack.enter_context(running(as_app(app, Settings(**settings) if settings else None)))
            page = browser.new_page()
            stack.callback(page.close)
            problems: list[str] = []
            page.on("console", lambda told: problems.extend([told.text] * _unasked(told)))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: _elsewhere(request.url, server.url, problems))
            pages.append((page, server, problems))
            page.goto(server.url + path)
            return page, server

        browser.clear_cookies()
        yield opened
        for page, _, problems in pages:
            assert problems == []
            page.close()  # So that the server has no session when it stops.


def _unasked(told: ConsoleMessage) -> bool:
    """Whether a console complains; of a token that is missing it has to."""
    return told.type in ("error", "warning") and "401" not in told.text


def _elsewhere(url: str, home: str, problems: list[str]) -> None:
    if urlsplit(url).scheme != "data" and urlsplit(url).netloc != urlsplit(home).netloc:
        problems.append(f"asked {url}")


def start(page: Page) -> None:
    page.locator("#choices button").first.wait_for()
    page.click("#reset")
    expect(page.locator(".entry.environment")).to_have_count(1)


def choose(page: Page, label: str) -> None:
    page.get_by_role("tab", name=label, exact=True).click()


def copied(page: Page) -> Any:
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    return json.loads(page.evaluate("navigator.clipboard.readText()"))


def test_an_episode_of_catch_by_keyboard_alone(play: Play) -> None:
    page, server = play("catch", "/web?split=train&index=4")
    expect(page.locator("#name")).to_have_text("catch")
    expect(page.locator("#rows")).to_have_text("of 500")
    page.focus("#index")
    page.keyboard.press("Enter")
    expect(page.locator("#field-direction")).to_be_focused()
    for number, key in enumerate("rrsssssss", 1):
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        expect(page.locator("#progress")).to_contain_text(f" {number} of 32")
    expect(page.locator("#transcript .entry.end")).to_contain_text("terminated, with a reward of 1.")
    expect(page.locator("#total")).to_have_text("1")
    expect(page.locator("#state")).to_contain_text("step_count: 9")
    expect(page.locator("#reset")).to_be_focused()
    record = copied(page)
    assert record["environment"] == "catch" and record["reset"] == {"seed": 0, "split": "train", "index": 4}
    assert (record["reward"], record["done"], len(record["steps"])) == (1, True, 9)
    assert record["steps"][0]["action"] == {
        "type": "call_tool", "tool_name": "move", "arguments": {"direction": "right"},
    }  # fmt: skip
    assert record["steps"][-1]["answer"]["observation"]["result"] == "caught"
    # Another: the next row, on the same session.
    page.click("#next")
    expect(page.locator("#state")).to_contain_text("index: 5")
    expect(page.locator("#transcript .entry")).to_have_count(1)
    assert len(server.sessions.live) == 1


def test_the_teacher_shows_how(play: Play) -> None:
    page, _ = play("catch", "/web?split=train&index=4")
    start(page)
    for number in range(1, 10):
        page.click("#teacher")
        expect(page.locator("#field-direction")).not_to_have_value("")
        page.click("#send")
        expect(page.locator("#progress")).to_contain_text(f" {number} of 32")
    expect(page.locator("#total")).to_have_text("1")


def test_forms_are_what_the_schemas_say(play: Play) -> None:
    page, _ = play(Zoo)
    start(page)
    expect(page.locator(".entry.system")).to_contain_text("You look after the animals.")
    assert page.locator("#field-animal option").all_inner_texts() == ["choose…", "lion", "otter"]
    page.click("#send")
    assert page.evaluate("document.activeElement.validationMessage") != ""
    page.select_option("#field-animal", label="otter")
    page.fill("#field-kilos", "1.5")
    page.check("#field-gently")
    page.fill("#field-notes", '["likes fish"')
    page.click("#send")
    assert "no JSON" in page.evaluate("document.activeElement.validationMessage")
    expect(page.locator(".entry.you")).to_have_count(0)
    page.fill("#field-notes", '["likes fish"]')
    page.click("#send")
    expect(page.locator(".entry.environment").nth(1)).to_contain_text('["otter", 1.5, true, ["likes fish"]]')
    page.fill("#field-notes", "")
    page.uncheck("#field-gently")
    page.click("#send")
    expect(page.locator(".entry.environment").nth(2)).to_contain_text('["otter", 1.5, false, null]')
    assert "notes" not in copied(page)["steps"][1]["action"]["arguments"]


def test_replies_images_rewards_and_what_is_refused(play: Play) -> None:
    page, _ = play(Zoo)
    start(page)
    choose(page, "look")
    page.click("#send")
    picture = page.locator(".entry img")
    picture.wait_for()
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [40, 30]
    choose(page, "Reply")
    page.fill("#field-text", "hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    expect(page.locator(".entry.environment").last).to_contain_text("You said: hello\nthere")
    expect(page.locator("#field-text")).to_have_value("")
    choose(page, "Raw")
    page.fill("#field-action", '{"type": "dance"}')
    page.click("#send")
    expect(page.locator(".entry.error")).to_contain_text("found {'type': 'dance'}")
    choose(page, "Reply")
    page.fill("#field-text", "bye")
    page.keyboard.press("Enter")
    expect(page.locator(".entry.end .chip")).to_have_text(["kindness +1.5", "speed –"])
    expect(page.locator("#total")).to_have_text("1")  # -0.25 twice, and 1.5 at the end.


def test_what_an_environment_says_is_text(play: Play) -> None:
    page, _ = play(Zoo)
    start(page)
    expect(page.locator(".entry.environment")).to_contain_text(HOSTILE)
    assert page.locator("#transcript img, #transcript script").count() == 0
    expect(page).to_have_title("Zoo · Turnwise")


def test_an_environment_written_for_openenv(play: Play) -> None:
    page, _ = play(TypedEnv(Grid, GridAction, GridObservation))
    start(page)
    assert page.locator("#choices button").all_inner_texts() == ["GridAction", "Raw"]
    assert page.locator("#field-metadata").count() == 0
    column = page.locator("#field-column")
    assert [column.get_attribute(name) for name in ("type", "min", "max", "step")] == [
        "number",
        "0",
        "6",
        "1",
    ]
    page.select_option("#field-direction", label="UP")
    column.fill("7")
    page.keyboard.press("Enter")
    assert "6" in column.evaluate("input => input.validationMessage")
    column.fill("3")
    page.keyboard.press("Enter")
    expect(page.locator(".entry.environment").last).to_contain_text("[0, 0, 0, 1, 0, 0, 0]")
    expect(page.locator("#state")).to_contain_text("column: 3")
    choose(page, "Raw")
    page.fill("#field-action", '{"direction": "DOWN", "column": 1, "force": 0.5}')
    page.keyboard.press("Control+Enter")
    expect(page.locator(".entry.end")).to_contain_text("done, with a reward of 0.5.")


def test_a_token_is_asked_for(play: Play) -> None:
    page, server = play(Zoo, "/", token="open sesame")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.locator("#token-dialog").wait_for()
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-why")).to_contain_text("refused")
    assert page.locator("#name").inner_text() == "…"
    page.fill("#token", "open sesame")
    page.keyboard.press("Enter")
    start(page)
    assert any(url.endswith("/ws") for url in asked) and not any("sesame" in url for url in asked)
    assert urlopen(f"{server.url}/web").status == 200


@pytest.fixture
def framed(playwright: Playwright) -> Iterator[Callable[..., tuple[Page, FrameLocator]]]:
    """The page in a frame of another site, as Hugging Face shows a Space, without storage."""
    with ExitStack() as stack:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*ARGS, "--test-third-party-cookie-phaseout"]
        )
        stack.callback(chromium.close)

        def opened(*, https: bool = False, **settings: Any) -> tuple[Page, FrameLocator]:
            inner = stack.enter_context(running(as_app("catch", Settings(**settings))))
            shown = HTMLResponse(f'<iframe src="{inner.url}/web" width="1000" height="700"></iframe>')
            outer = stack.enter_context(running(Starlette(routes=[Route("/", lambda _: shown)])))
            # What a proxy with TLS tells a server that trusts it.
            context = chromium.new_context(extra_http_headers={"X-Forwarded-Proto": "https"} if https else {})
            stack.callback(context.close)
            page = context.new_page()
            page.goto(outer.url.replace("127.0.0.1", "localhost"))
            return page, page.frame_locator("iframe")

        yield opened


def test_in_a_frame_of_another_site_that_has_no_storage(framed: Any) -> None:
    page, frame = framed()
    frame.locator("#choices button").first.wait_for()
    stored = page.frames[1].evaluate("(() => { try { return !!localStorage } catch { return null } })()")
    assert stored is None  # Else this shows nothing.
    frame.locator("#reset").click()
    expect(frame.locator(".entry.environment")).to_contain_text("paddle")
    frame.locator("#theme").click()
    expect(frame.locator("html")).to_have_attribute("data-theme", "dark")


def test_a_token_in_a_frame_of_another_site(framed: Any) -> None:
    _, frame = framed(https=True, token="open sesame")
    frame.locator("#token").fill("open sesame")
    frame.locator("#token").press("Enter")
    frame.locator("#choices button").first.wait_for()
    frame.locator("#reset").click()
    expect(frame.locator(".entry.environment")).to_contain_text("paddle")


def test_a_token_in_a_frame_that_keeps_no_cookie_is_for_a_tab_of_its_own(framed: Any) -> None:
    page, frame = framed(token="open sesame")
    frame.locator("#token").fill("open sesame")
    frame.locator("#token").press("Enter")
    expect(frame.locator("#alert")).to_contain_text("The token is right")
    with page.expect_popup() as popup:
        frame.get_by_role("link", name="Open it in its own tab").click()
    tab = popup.value
    tab.fill("#token", "open sesame")
    tab.keyboard.press("Enter")
    start(tab)


def test_a_long_observation_is_folded_and_leaves_the_action_in_sight(play: Play) -> None:
    page, _ = play(TypedEnv(Grid, GridAction, GridObservation))
    start(page)
    page.select_option("#field-direction", label="UP")
    page.fill("#field-column", "3")
    page.keyboard.press("Enter")
    seen = page.locator(".entry.environment").last
    seen.get_by_role("button", name="Show all", exact=True).wait_for()
    assert seen.inner_text().count("\n") < 40 and seen.locator("span").count() < 500
    expect(seen.locator(".page")).to_contain_text("turn 99")
    expect(seen.locator(".page")).not_to_contain_text("turn 50")
    expect(page.locator(".entry.you")).to_be_in_viewport(ratio=1)
    expect(page.locator(".entry.you")).to_contain_text('GridAction(direction="UP", column=3)')
    seen.get_by_role("button", name="Show all", exact=True).click()
    expect(seen).to_contain_text("[83, 83, 255]")
    seen.get_by_role("button", name="Show less").click()
    expect(seen).not_to_contain_text("[83, 83, 255]")


def test_of_a_long_text_the_end_is_shown_too(play: Play) -> None:
    page, _ = play(Zoo)
    start(page)
    choose(page, "Reply")
    page.fill("#field-text", "\n".join(f"turn {number}." for number in range(1, 101)))
    page.keyboard.press("Enter")
    seen = page.locator(".entry.environment").last
    expect(seen).to_contain_text("turn 1.")
    expect(seen).to_contain_text("turn 100.")
    expect(seen).not_to_contain_text("turn 50.")
    seen.get_by_role("button", name="Show all 100 lines").click()
    expect(seen).to_contain_text("turn 50.")


def test_a_lost_connection_is_told_and_another_episode_played(play: Play) -> None:
    page, server = play(Zoo, idle_timeout=0.5)
    start(page)
    expect(page.locator(".entry.error")).to_contain_text("The episode is lost.")
    expect(page.locator(".entry.error")).to_contain_text("idle")
    expect(page.locator("#send")).to_be_disabled()
    keeper = server.sessions._keeper
    until(lambda: not server.sessions.live and keeper is not None and keeper.done())
    server.sessions.settings = replace(server.sessions.settings, idle_timeout=None)
    page.click("#reset")
    expect(page.locator(".entry.error")).to_have_count(0)
    expect(page.locator("#send")).to_be_enabled()


def test_a_full_server_is_told(play: Play) -> None:
    first, server = play(Zoo, max_sessions=1, queue=0)
    start(first)
    second = first.context.new_page()
    second.goto(server.url + "/web")
    second.locator("#choices button").first.wait_for()
    second.click("#reset")
    expect(second.locator("#alert")).to_contain_text("1 of 1 sessions are in use")
    expect(second.locator("#reset")).to_be_enabled()
    second.close()


def test_who_waits_for_long_may_leave(play: Play) -> None:
    page, _ = play(Zoo)
    start(page)
    choose(page, "sleep")
    page.fill("#field-seconds", "60")
    page.keyboard.press("Enter")
    expect(page.locator("#connection")).to_contain_text("waiting")
    page.click("#leave")
    expect(page.locator(".entry.error")).to_contain_text("The episode is lost.")
    expect(page.locator("#connection")).to_contain_text("not connected")


def test_behind_a_path_prefix(play: Play) -> None:
    page, _ = play(Starlette(routes=[Mount("/deep/down", as_app(Zoo))]), "/deep/down/web/")
    start(page)
    assert urlsplit(page.url).path == "/deep/down/web"


def test_light_dark_narrow_and_labelled(play: Play) -> None:
    page, _ = play(Zoo)
    start(page)

    def shown() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = shown()
    page.emulate_media(color_scheme="dark")
    dark = shown()
    assert light != dark
    page.click("#theme")
    assert shown() == light
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unlabelled = "[...document.querySelectorAll('input, select, textarea')].filter(i => !i.labels.length)"
    assert page.evaluate(f"{unlabelled}.map(i => i.id)") == []


def test_nothing_but_the_pages_files_is_served(play: Play) -> None:
    page, server = play(Zoo)
    for name in ("page.py", "..%2fwire.py", "page.html", "nothing"):
        assert page.request.get(f"{server.url}/web/{name}").status == 404, name
    for path in sorted((Path(models.__file__).parent).glob("page*.*")):
        if path.suffix in (".js", ".css"):
            answer = page.request.get(f"{server.url}/web/{path.name}")
            assert (answer.status, answer.body()) == (200, path.read_bytes())
            assert answer.headers["content-type"].startswith(
                f"text/{'css' if path.suffix == '.css' else 'java'}"
            )
