from dataclasses import replace

import numpy as np
import pytest
from tests.support.samples import random_sample

from turnwise.errors import LearnError
from turnwise.learn.normalise import weigh
from turnwise.types import Sample


def masked(id: str, tokens: int, env: str = "a") -> Sample:
    base = random_sample(np.random.default_rng(0), 12, id=id, env=env)
    mask_T = np.zeros(12, dtype=np.bool_)
    mask_T[2 : 2 + tokens] = True
    return replace(base, loss_mask_T=mask_T)


# t0 has two segments, of 2 and 4 tokens; t1 one of 3; t2, in another environment, one of 1.
SAMPLES = [masked("t0", 2), masked("t0", 4), masked("t1", 3), masked("t2", 1, "b")]


def per_token(samples: list[Sample]) -> list[float]:
    return [float(sample.weights_T[2]) for sample in samples]


def test_token() -> None:
    assert per_token(weigh(SAMPLES, "token")) == pytest.approx([0.1] * 4)


def test_sequence_counts_a_trajectory_of_several_segments_once() -> None:
    assert per_token(weigh(SAMPLES, "sequence")) == pytest.approx([1 / 18, 1 / 18, 1 / 9, 1 / 3])


def test_constant() -> None:
    assert per_token(weigh(SAMPLES, "constant", max_tokens=50)) == pytest.approx([1 / 150] * 4)


def test_each_environment_gets_the_same_total() -> None:
    assert per_token(weigh(SAMPLES, "token", by_env=True)) == pytest.approx([1 / 18] * 3 + [1 / 2])
    weighed = weigh(SAMPLES, "sequence", by_env=True)
    assert per_token(weighed) == pytest.approx([1 / 24, 1 / 24, 1 / 12, 1 / 2])
    totals = {env: sum(s.weights_T.sum() for s in weighed if s.env == env) for env in "ab"}
    assert totals == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}


def test_weights_are_zero_off_the_mask_and_for_a_row_without_loss() -> None:
    weighed = weigh([*SAMPLES, masked("t3", 0)], "sequence")
    for sample in weighed:
        assert (sample.weights_T[~sample.loss_mask_T] == 0).all()
    assert per_token(weighed[:4]) == per_token(weigh(SAMPLES, "sequence"))


@pytest.mark.parametrize(("mode", "max_tokens"), [("constant", None), ("token", 8)])
def test_max_tokens_belongs_to_constant(mode: str, max_tokens: int | None) -> None:
    with pytest.raises(LearnError, match="max_tokens belongs to normalise=constant"):
        weigh(SAMPLES, mode, max_tokens=max_tokens)
