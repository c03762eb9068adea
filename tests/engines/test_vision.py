"""The embedded engine sees: its logprobs are those of the plain module, which is given the pixels whole."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.engines.reference import CLOSE, Gate, Weights, greedy
from tests.support.models import tiny_qwen3
from tests.support.vision import FAMILIES, VlFamily, picture_block, plain_logprobs, vl_model, vl_renderer

from turnwise.engines.transformers import TransformersEngine
from turnwise.errors import ContextOverflowError, EngineError
from turnwise.types import Completion, ImageBlock, Message, Sampling, TextBlock, ToolCall

RENDERER = vl_renderer()
VISION = RENDERER.vision
assert VISION is not None
RED, BLUE = picture_block("red", (16, 24)), picture_block("blue", (16, 24))
WIDE, DOT = picture_block("green", (64, 16)), picture_block("white", (8, 8))
"""6, 6, 16 and 1 tokens."""


def run_seeing(model: Any, scenario: Callable[[TransformersEngine], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        options.setdefault("max_context", 512)
        async with TransformersEngine(model, vision=VISION, max_sequences=8, **options) as engine:
            await asyncio.wait_for(scenario(engine), 60)

    asyncio.run(main())


def asked(*blocks: TextBlock | ImageBlock | str) -> Message:
    return Message.user(tuple(TextBlock(text=one) if isinstance(one, str) else one for one in blocks))


def answered(*blocks: TextBlock | ImageBlock | str) -> Message:
    call = ToolCall(name="look", arguments={}, id="t0c0")
    return Message.tool(asked(*blocks).content, call=call)


def drawn(tokens: int, seed: int = 0, temperature: float = 1.0) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=temperature, seed=seed, stop_ids=RENDERER.stop_ids)


class Talk:
    """A conversation whose tokens are kept, as a policy keeps them."""

    def __init__(self, engine: TransformersEngine, session: str | None, *opening: Message) -> None:
        self.engine, self.session = engine, session
        rendered = RENDERER.prompt(opening)
        self.ids, self.images = list(rendered.ids), list(rendered.images)
        self.replies: list[tuple[int, Completion]] = []

    async def hear(self, sampling: Sampling, *told: Message) -> Completion:
        if told:
            bridge = RENDERER.bridge(self.ids, told)
            assert bridge is not None
            self.ids += bridge.ids
            self.images += bridge.images
        reply = await self.engine.generate(self.ids, sampling, session=self.session, images=self.images)
        self.replies.append((len(self.ids), reply))
        self.ids += reply.ids
        return reply

    def assert_agrees(self, model: Any, replies: Sequence[int] | None = None) -> None:
        """Every reply's logprobs are those of one forward of the module over the whole row."""
        expected = plain_logprobs(model, self.ids, self.images)
        for start, reply in [self.replies[i] for i in replies or range(len(self.replies))]:
            row = expected[start - 1 : start - 1 + len(reply.ids)]
            np.testing.assert_allclose(reply.logprobs, row, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill", [2048, 7], ids=["whole", "cut"])
def test_replies_over_several_turns_with_images_are_the_plain_module_s(
    family: VlFamily, prefill: int
) -> None:
    """Prompt and tool images, several a turn, KV kept; images are cut by the ends of steps, too."""
    model = vl_model(family)

    async def scenario(engine: TransformersEngine) -> None:
        async def talk(name: str, first: ImageBlock, seed: int) -> Talk:
            one = Talk(engine, name, asked("Two pictures:", first, " and ", WIDE, " What is there?"))
            shown = one.ids.index(model.config.image_token_id)
            assert (await one.hear(drawn(9, seed))).cached_tokens <= shown
            kept = len(one.ids) - 1
            second = await one.hear(drawn(7, seed + 1), answered(DOT, "then", BLUE), answered("none"))
            assert second.cached_tokens == kept, "only what the context grew by is computed"
            await one.hear(drawn(9, seed + 2), asked("No picture this time."))
            await one.hear(drawn(3, seed + 3), answered(WIDE))
            return one

        for one in await asyncio.gather(talk("a", RED, 1), talk("b", BLUE, 5), talk("c", DOT, 9)):
            one.assert_agrees(model)

    run_seeing(model, scenario, prefill_tokens=prefill)


def test_a_prompt_that_shows_another_image_shares_no_kv_behind_it() -> None:
    """The rows of ids are equal; siblings that see the same share all of it."""
    model = vl_model()

    async def scenario(engine: TransformersEngine) -> None:
        talks = [Talk(engine, None, asked("Look: ", one, " What?")) for one in (RED, RED, BLUE)]
        assert talks[0].ids == talks[2].ids
        for talk, cached in zip(talks, (0, len(talks[0].ids) - 1, None), strict=True):
            reply = await talk.hear(drawn(8))
            before = talk.ids.index(model.config.image_token_id)
            assert reply.cached_tokens == (before if cached is None else cached)
            talk.assert_agrees(model)
        assert talks[0].replies[0][1].logprobs != talks[2].replies[0][1].logprobs

    run_seeing(model, scenario)


def test_an_image_is_encoded_once_for_each_version_of_the_weights() -> None:
    old, new = vl_model(seed=0), vl_model(seed=1)

    async def scenario(engine: TransformersEngine) -> None:
        encoded: list[int] = []
        visual: Any = engine._core._model.model.visual  # type: ignore[attr-defined]
        visual.register_forward_pre_hook(
            lambda _, args, kwargs: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True
        )
        one = Talk(engine, "s", asked(RED, WIDE, RED, "?"))
        siblings = [Talk(engine, None, asked(RED, " again ", WIDE)) for _ in range(4)]
        await asyncio.gather(one.hear(drawn(5)), *(sibling.hear(drawn(5)) for sibling in siblings))
        await one.hear(drawn(5), answered(RED))
        one.assert_agrees(old)
        assert sum(encoded) == 2
        await engine.load_weights(Weights(new), 1)
        await one.hear(drawn(5), answered(DOT))
        assert sum(encoded) == 5, "both again, and the new one"
        one.assert_agrees(new, [2])
        assert one.replies[2][1].versions == [1] * len(one.replies[2][1].ids)

    run_seeing(old, scenario)


def test_a_running_request_is_prefilled_again_with_new_features() -> None:
    old, new = vl_model(seed=0), vl_model(seed=1)

    async def scenario(engine: TransformersEngine) -> None:
        talk = Talk(engine, "s", asked(RED, "and", WIDE))
        hold = Gate(engine).hold(20)
        reply = asyncio.create_task(talk.hear(greedy(200)))
        async with hold:
            loading = asyncio.create_task(engine.load_weights(Weights(new), 1))
        await loading
        done = await reply
        turn = done.versions.index(1)
        assert 0 < turn < 200
        start = talk.replies[0][0]
        for model, part in ((old, slice(0, turn)), (new, slice(turn, None))):
            expected = plain_logprobs(model, talk.ids, talk.images)[start - 1 :]
            np.testing.assert_allclose(done.logprobs[part], expected[part], atol=CLOSE, rtol=0)

    run_seeing(old, scenario)


def test_evicted_sessions_see_again_what_they_saw() -> None:
    model = vl_model("qwen2_5_vl")

    async def scenario(engine: TransformersEngine) -> None:
        talks = [Talk(engine, f"s{n}", asked(one, "?")) for n, one in enumerate((RED, BLUE, WIDE, DOT))]
        for turn in range(3):
            for talk in talks:
                await talk.hear(drawn(6, turn), *([answered(BLUE, RED)] if turn else []))
        assert engine.stats.evictions > 0
        for talk in talks:
            talk.assert_agrees(model)

    run_seeing(model, scenario, kv_tokens=2 * 512)


def test_text_alone_is_read_by_a_model_that_sees() -> None:
    model = vl_model()

    async def scenario(engine: TransformersEngine) -> None:
        talk = Talk(engine, "s", Message.user("No pictures."))
        await talk.hear(drawn(8))
        await talk.hear(drawn(8), Message.user("None at all."))
        talk.assert_agrees(model)

    run_seeing(model, scenario)


def test_the_placeholder_is_never_said() -> None:
    model = vl_model()

    async def scenario(engine: TransformersEngine) -> None:
        hot = [Sampling(max_tokens=200, temperature=50.0, seed=seed) for seed in range(20)]
        replies = await asyncio.gather(*(engine.generate([5], one) for one in hot))
        said = [token for reply in replies for token in reply.ids]
        assert len(said) == 4000 and len(set(said)) > 400
        assert model.config.image_token_id not in said

    run_seeing(model, scenario)


def test_prompts_whose_images_cannot_be_placed_are_refused() -> None:
    prompt = RENDERER.prompt([asked(RED, "?")])
    end = prompt.ids.index(RENDERER.tokenizer.convert_tokens_to_ids("<|vision_end|>"))

    async def scenario(engine: TransformersEngine) -> None:
        for ids, shown, found in (
            (prompt.ids, [], "6 image placeholders does not fit its 0 images"),
            (prompt.ids, [RED.sha256] * 2, "does not fit its 2 images, which take \\[6, 6\\]"),
            (prompt.ids, [WIDE.sha256], "does not fit its 1 images, which take \\[16\\]"),
            (prompt.ids, ["0" * 64], "image 0{64} is not stored here"),
            (prompt.ids[:end], [RED.sha256], "the prompt ends with an image"),
        ):
            with pytest.raises(EngineError, match=found):
                await engine.generate(ids, greedy(2), images=shown)
        with pytest.raises(ContextOverflowError):
            await engine.generate(prompt.ids * 40, greedy(2), images=[RED.sha256] * 40)

    run_seeing(vl_model(), scenario)


def test_a_processor_of_another_model_is_refused() -> None:
    model = vl_model()
    model.config.image_token_id += 1
    with pytest.raises(EngineError, match="they do not belong together"):
        TransformersEngine(model, vision=VISION)
    with pytest.raises(EngineError, match="Qwen3ForCausalLM reads images in a way"):
        TransformersEngine(tiny_qwen3(), vision=VISION)
