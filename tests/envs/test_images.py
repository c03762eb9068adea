"""What environments show: images in every form in which authors write them, wherever those live."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path

import pytest
from PIL import Image
from tests.support.vision import picture

from turnwise import Env, Message, Step, images, tool
from turnwise.envs.observe import task_row
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.errors import EnvError
from turnwise.types import ImageBlock, TextBlock, ToolCall

HERE = Path(__file__)


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    picture(color).save(file, "PNG")
    return file.getvalue()


def block(color: str = "red") -> ImageBlock:
    return images.put(picture(color))


URL = "data:image/png;base64," + base64.b64encode(png()).decode()
FORMS = {
    "pil": lambda: picture(),
    "pil in a list": lambda: ["Look:", picture()],
    "ours": lambda: [TextBlock(text="Look:"), block()],
    "trl": lambda: [{"type": "text", "text": "Look:"}, {"type": "image", "image": picture()}],
    "bytes": lambda: [{"type": "text", "text": "Look:"}, {"type": "image", "image": png()}],
    "openai": lambda: ("Look:", {"type": "image_url", "image_url": {"url": URL}}),
    "a step": lambda: Step(["Look:", picture()], reward=1.0),
    "several": lambda: [picture("red"), "and", picture("blue"), picture("red")],
    "http": lambda: [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}],
    "broken": lambda: [{"type": "image", "image": b"no image"}],
    "empty": lambda: [{"type": "image"}],
    "a path": lambda: [{"type": "image", "image": "cat.png"}],
    "json": lambda: [{"type": "text", "text": "only words"}],
    "long": lambda: ["x" * 600, picture()],
}
LOOK = (TextBlock(text="Look:"), block())
TOLD = {
    "pil": (block(),), "pil in a list": LOOK, "ours": LOOK, "trl": LOOK, "bytes": LOOK, "openai": LOOK,
    "a step": LOOK, "several": (block("red"), TextBlock(text="and"), block("blue"), block("red")),
    "json": '[{"type":"text","text":"only words"}]',
}  # fmt: skip
REFUSED = {
    "http": "none is fetched", "broken": "no image that Pillow reads", "a path": "block that holds a str",
    "empty": "an image block that holds None",
}  # fmt: skip


class Gallery(Env):
    """Shows what it is asked for."""

    def reset(self, task):
        shown = task.get("picture")
        assert shown is None or isinstance(shown, Image.Image)
        return ["Ask.", shown] if shown else FORMS[task["form"]]()

    @tool
    def show(self, form: str):
        """Show a form."""
        return FORMS[form]()

    def step(self, reply):
        return Step([Message.user("Here:"), Message.user((TextBlock(text=reply), block("blue")))])


class FarGallery(Gallery):
    isolation = "process"


def show(form: str) -> ToolCall:
    return ToolCall(name="show", arguments={"form": form}, id="c1")


@pytest.mark.parametrize("cls", ["Gallery", "FarGallery"])
def test_a_tool_shows_images(cls):
    async def play():
        env = await make(f"{HERE}:{cls}").open(Limits(max_observation=500))
        await env.reset({"form": "pil"}, 0)
        for form, told in TOLD.items():
            result = await env.call(show(form))
            assert (form, result.content, result.error) == (form, told, None)
        for form, told in REFUSED.items():
            result = await env.call(show(form))
            assert result.error == "bad_result" and told in result.content, (form, result)
        (text, shown) = (await env.call(show("long"))).content
        assert text.text.endswith("[100 more characters cut off: the limit is 500]") and shown == block()
        step = await env.step(Message.assistant("mine"))
        assert step.observation[1] == Message.user((TextBlock(text="mine"), block("blue")))
        await env.close()

    asyncio.run(play())


@pytest.mark.parametrize("cls", ["Gallery", "FarGallery"])
def test_images_of_another_process_are_stored_in_this_one(cls, monkeypatch):
    """And a task's are there for it to see."""

    async def play():
        env = await make(f"{HERE}:{cls}").open(Limits())
        green = picture("green", (40, 8))
        task = task_row({"picture": green, "n": 1}, "row")
        assert task == {
            "n": 1,
            "picture": {"type": "image", "media_type": "image/png", "sha256": block_of(green)},
        }
        monkeypatch.setattr(images, "STORE", images.ImageStore())
        images.put(green)
        first = await env.reset(task, 0)
        assert first == (Message.user((TextBlock(text="Ask."), images.put(green))),)
        result = await env.call(show("several"))
        for shown in (part for part in result.content if isinstance(part, ImageBlock)):
            assert images.load(shown.sha256).size == (16, 16)
        again = await env.call(show("several"))
        assert again.content == result.content
        await env.close()

    asyncio.run(play())


def block_of(image: Image.Image) -> str:
    return images.put(image).sha256


def test_a_reset_with_images_that_are_none_says_so():
    async def play():
        env = await make(Gallery).open(Limits())
        assert await env.reset({"form": "trl"}, 0) == (Message.user(LOOK),)
        for form, told in REFUSED.items():
            with pytest.raises(EnvError, match=told):
                await env.reset({"form": form}, 0)

    asyncio.run(play())


class Painter:
    """As TRL's scripts write them."""

    def reset(self, image=None, **row):
        return [{"type": "text", "text": " You:"}, {"type": "image", "image": picture("blue")}]

    def paint(self, color: str):
        """Paint.

        Args:
            color: A colour.
        """
        return [{"type": "image", "image": picture(color)}, {"type": "text", "text": color}]


PLAIN = "What is this?"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PLAIN}]
PLACED = [
    {"role": "user", "content": [{"type": "text", "text": "Here"}, {"type": "image"}, {"type": "image"}]}
]
HELD = [
    {"role": "user", "content": [{"type": "image", "image": picture("red")}, {"type": "text", "text": "?"}]}
]
YOU = (TextBlock(text=" You:"), block("blue"))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": PLAIN}, [(TextBlock(text=PLAIN), *YOU)]),
        ({"prompt": PLAIN, "image": picture("red")}, [(block("red"), TextBlock(text=PLAIN), *YOU)]),
        (
            {"prompt": CHAT, "images": [picture("red"), picture("green")]},
            ["Be brief.", (block("red"), block("green"), TextBlock(text=PLAIN), *YOU)],
        ),
        (
            {"prompt": PLACED, "images": [picture("green"), picture("red")]},
            [(TextBlock(text="Here"), block("green"), block("red"), *YOU)],
        ),
        ({"prompt": HELD}, [(block("red"), TextBlock(text="?"), *YOU)]),
    ],
    ids=["text", "image", "images", "placed", "held"],
)
def test_a_row_s_images_are_shown_as_trl_shows_them(row, messages):
    """`trl.data_utils.prepare_multimodal_messages` is the referee of where they stand."""
    from trl.data_utils import prepare_multimodal_messages

    async def play():
        env = await make(Painter).open(Limits())
        first = await env.reset(task_row(row, "row"), 0)
        assert [message.content for message in first] == messages
        painted = await env.call(ToolCall(name="paint", arguments={"color": "red"}, id="c"))
        assert painted.content == (block("red"), TextBlock(text="red"))
        return first

    first = asyncio.run(play())
    prompt = (
        row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    )
    shown = row.get("images") or ([row["image"]] if "image" in row else [])
    for ours, theirs in zip(first, prepare_multimodal_messages(prompt, images=shown), strict=True):
        content = ours.as_dict(lambda one: one.sha256)["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if ours is first[-1]:
            content = content[: -len(YOU)]
        assert content == [
            {**part, "image": block_of(part["image"])} if part["type"] == "image" else part
            for part in theirs["content"]
        ]


def test_places_and_images_that_do_not_fit_are_refused():
    async def play():
        env = await make(Painter).open(Limits())
        for row, found in (
            ({"prompt": PLACED, "image": picture()}, "has 1 images, and its 'prompt' has 2 places"),
            ({"prompt": [{"role": "system", "content": "s"}], "image": picture()}, "no user's message"),
        ):
            with pytest.raises(EnvError, match=found):
                await env.reset(task_row(row, "row"), 0)

    asyncio.run(play())
