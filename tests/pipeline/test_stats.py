"""Intervals, pass@k and pairing against values worked out by hand."""

import numpy as np
import pytest

from turnwise.pipeline.stats import bootstrap_mean, paired_gain, pass_at_k


def test_mean_weighs_tasks_not_episodes():
    assert bootstrap_mean({"a": [1.0] * 9, "b": [0.0]}, resamples=100, seed=0).mean == 0.5


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        rewards = {str(i): [float(rng.random() < 0.3)] for i in range(100)}
        interval = bootstrap_mean(rewards, resamples=300, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_one_task_has_a_degenerate_interval():
    interval = bootstrap_mean({"a": [0.25, 0.75]}, resamples=100, seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_nothing_scored_is_an_error_not_zero():
    with pytest.raises(ValueError, match="no scored episode"):
        bootstrap_mean({"a": []}, resamples=100, seed=0)


def test_pass_at_k_is_the_unbiased_estimator():
    # n = 4, c = 1: 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert pass_at_k({"a": [1, 0, 0, 0]}, 2) == 0.5
    assert pass_at_k({"a": [1, 0, 0, 0], "b": [0, 0, 0, 0]}, 2) == 0.25
    assert pass_at_k({"a": [1, 0]}, 3) is None


def test_pairing_removes_task_difficulty():
    before = {str(i): [float(i % 10)] for i in range(50)}
    after = {task: [values[0] + 0.5] for task, values in before.items()}
    gain = paired_gain(before, after, resamples=200, seed=0)
    assert gain is not None and (gain.mean, gain.low, gain.high) == (0.5, 0.5, 0.5)
    assert paired_gain({"a": [1.0]}, {"b": [1.0]}, resamples=100, seed=0) is None
