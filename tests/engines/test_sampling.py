"""Drawing: log-probabilities, kept mass and chance itself, against float64 and transformers' own warpers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.engines.reference import CLOSE, logprobs_of, prompt, run_with, together
from tests.support.models import tiny_qwen3
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from turnwise.engines.sampling import Drawn, Draws, key_of, uniforms
from turnwise.engines.sampling import draw as draw_at
from turnwise.engines.transformers import TransformersEngine
from turnwise.types import Sampling

MODEL = tiny_qwen3()


def draws(rows: int, **changes: Any) -> Draws:
    """Plain sampling at temperature 1 with seeds 0, 1, 2 …; ``changes`` are scalars or arrays over rows."""
    values: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "key": [key_of(n) for n in range(rows)],
        **changes,
    }
    types = {"top_k": np.int64, "key": np.uint64}
    return Draws(
        **{
            k: np.broadcast_to(np.asarray(v, types.get(k, np.float32)), rows).copy()
            for k, v in values.items()
        }
    )


def draw(logits: torch.Tensor, how: Draws) -> Drawn:
    """The first token of each reply."""
    return draw_at(logits, how, np.zeros(len(logits), dtype=np.int64))


def reference(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Tempered probabilities in float64, and those of them that transformers' warpers keep."""
    scaled = logits.double() / (sampling.temperature or 1.0)
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    kept = warpers(torch.zeros(1, 1, dtype=torch.long), scaled.clone())
    probabilities = scaled.softmax(-1)
    return probabilities, torch.where(torch.isfinite(kept), probabilities, 0.0)


def nudged(sampling: Sampling, by: float) -> Sampling:
    """The cuts that there are, cutting that much more."""
    return replace(
        sampling,
        top_p=sampling.top_p - by if sampling.top_p < 1 else 1.0,
        min_p=min(sampling.min_p + by, 1.0) if sampling.min_p else 0.0,
    )


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 512, 1000])
def test_greedy_is_the_first_maximum(vocabulary: int) -> None:
    logits = torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(0)).round()
    drawn = draw(logits, draws(7, temperature=0))
    assert drawn.ids == logits.argmax(-1).tolist()
    expected = logits.double().log_softmax(-1).amax(-1)
    np.testing.assert_allclose(drawn.logprobs, expected, atol=1e-5)
    assert drawn.kept_mass is None


@pytest.mark.parametrize("vocabulary", [2, 65, 300])
def test_draws_follow_the_distribution(vocabulary: int) -> None:
    """Chi-squared over 40,000 draws, at its mean plus five deviations."""
    rows = 40_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 1.5
    drawn = draw(logits.expand(rows, -1), draws(rows))
    expected = logits.double().softmax(-1).numpy() * rows
    counts = np.bincount(drawn.ids, minlength=vocabulary)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = vocabulary - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_uniforms_are_uniform_and_independent() -> None:
    seeds = np.repeat(np.array([key_of(n) for n in range(300)], dtype=np.uint64), 300)
    index = np.tile(np.arange(300, dtype=np.int64), 300)
    numbers = uniforms(seeds, index)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * 90_000)
    grid = numbers.reshape(300, 300).astype(np.float64)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, :-1], grid[:-1, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 300
    assert key_of(-1) == key_of(2**64 - 1) != key_of(0)


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.integers(2, 200),
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.6]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 10_000]),
    top_p=st.sampled_from([1.0, 0.99, 0.8, 0.4, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_cuts_logprobs_and_kept_mass_equal_the_reference(
    vocabulary: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    assume(logits.sort().values.diff().amin() > 1e-6)  # Of equal ones top-k keeps either.
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = draw(
        logits,
        draws(
            16,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            key=[key_of(seed + n) for n in range(16)],
        ),
    )
    # A token on the very edge of a cut may fall on either side of it.
    probabilities, most = reference(logits, nudged(sampling, -1e-6))
    _, least = reference(logits, nudged(sampling, 1e-6))
    rows = torch.arange(16)
    assert (most[rows, drawn.ids] > 0).all(), "no token was drawn that is cut"
    np.testing.assert_allclose(drawn.logprobs, probabilities[rows, drawn.ids].log(), atol=1e-5)
    if sampling.truncates:
        kept = torch.tensor(drawn.kept_mass, dtype=torch.float64)
        torch.testing.assert_close(kept, kept.clamp(least.sum(-1), most.sum(-1)), atol=5e-6, rtol=0)
    else:
        assert drawn.kept_mass is None


def test_what_is_cut_is_never_drawn_and_what_is_kept_keeps_its_proportions() -> None:
    rows = 20_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0] + [-8.0] * 95).expand(rows, -1)
    drawn = draw(logits, draws(rows, top_k=3))
    _, kept = reference(logits[:1], Sampling(top_k=3))
    expected = (kept / kept.sum())[0, :3].numpy()
    counts = np.bincount(drawn.ids, minlength=3)
    assert len(counts) == 3
    np.testing.assert_allclose(counts / rows, expected, atol=5 * np.sqrt(0.25 / rows))


def test_rows_of_unlike_settings_do_not_touch_each_other() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(1)) * 2
    mixed = draw(
        logits,
        draws(4, temperature=[0, 1, 0.5, 2], top_k=[0, 5, 0, 0], top_p=[1, 1, 0.7, 1], min_p=[0, 0, 0, 0.1]),
    )
    for row, changes in enumerate(
        [
            {"temperature": 0},
            {"top_k": 5},
            {"temperature": 0.5, "top_p": 0.7},
            {"temperature": 2, "min_p": 0.1},
        ]
    ):
        alone = draw(logits[row : row + 1], draws(1, key=key_of(row), **changes))
        assert alone.ids == [mixed.ids[row]]
        assert alone.logprobs == pytest.approx([mixed.logprobs[row]], abs=1e-6)


def test_half_precision_logits_are_summed_in_single() -> None:
    logits = (torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))).to(torch.bfloat16)
    drawn = draw(logits, draws(3))
    expected = logits.double().log_softmax(-1)[torch.arange(3), drawn.ids]
    np.testing.assert_allclose(drawn.logprobs, expected, atol=1e-5)


# ---------------------------------------------------------------------------------- through the engine


def test_logprobs_and_kept_mass_of_replies() -> None:
    settings_ = [
        Sampling(max_tokens=20, temperature=0.7, seed=1),
        Sampling(max_tokens=20, temperature=1.3, top_k=20, seed=2),
        Sampling(max_tokens=20, top_p=0.6, seed=3),
        Sampling(max_tokens=20, temperature=0.8, min_p=0.05, seed=4),
        Sampling(max_tokens=20, temperature=0.0, seed=5),
    ]
    p = prompt(25, 1)

    async def scenario(engine: TransformersEngine) -> None:
        completions = await asyncio.gather(*(engine.generate(p, s) for s in settings_))
        for sampling, completion in zip(settings_, completions, strict=True):
            expected = logprobs_of(MODEL, p, completion.ids, sampling.temperature or 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)
            if not sampling.truncates:
                assert completion.kept_mass is None
                continue
            with torch.inference_mode():
                logits = MODEL(torch.tensor([p + completion.ids])).logits[0, len(p) - 1 : -1]
            _, kept = reference(logits, sampling)
            np.testing.assert_allclose(completion.kept_mass, kept.sum(-1), atol=CLOSE)

    run_with(MODEL, scenario)


def test_a_seed_draws_the_same_whatever_else_runs() -> None:
    p = prompt(25, 1)
    sampling = Sampling(max_tokens=30, seed=42)

    async def scenario(engine: TransformersEngine) -> None:
        alone = await engine.generate(p, sampling)
        others = (engine.generate(prompt(5 + 3 * n, n), Sampling(max_tokens=50, seed=n)) for n in range(6))
        crowded, *_ = await together(engine, engine.generate(p, sampling), *others)
        assert crowded.ids == alone.ids
        assert (await engine.generate(p, sampling)).ids == alone.ids, "whoever was in its slot before"
        assert (await engine.generate(p, Sampling(max_tokens=30, seed=43))).ids != alone.ids
        # Without a seed, each call is another draw.
        unseeded = [await engine.generate(p, Sampling(max_tokens=30)) for _ in range(2)]
        assert unseeded[0].ids != unseeded[1].ids
        # A seed may be any integer.
        for seed in (-1, 2**70):
            await engine.generate(p, Sampling(max_tokens=1, seed=seed))

    run_with(MODEL, scenario)
