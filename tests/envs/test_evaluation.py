"""Summaries of returns against textbook values."""

import json
import math

import numpy as np
import pytest

from minrl.envs.evaluation import Evaluation, student_t_quantile


def make(returns, name="Hopper-v5", **options):
    returns = np.asarray(returns, dtype=np.float64)
    return Evaluation(name, 3600.0, returns, np.full(len(returns), 10), seed=0, **options)


@pytest.mark.parametrize(
    ("degrees", "expected"),  # two-sided 95 % column of any table of Student's t
    [
        (1, 12.7062),
        (2, 4.3027),
        (4, 2.7764),
        (9, 2.2622),
        (30, 2.0423),
        (99, 1.9842),
        (999, 1.9623),
    ],
)
def test_t_quantiles_agree_with_the_tables(degrees, expected):
    assert student_t_quantile(0.95, degrees) == pytest.approx(expected, abs=1e-4)


def test_interval_covers_the_true_mean_95_times_in_100():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = make(generator.normal(1000, 300, 10)).interval_95
        hits += low < 1000 < high
    assert 930 <= hits <= 970  # 950 ± 3 standard deviations of a binomial


def test_the_interval_is_students():
    evaluation = make([1.0, 2.0, 4.0])
    half_width = 4.3027 * math.sqrt(7 / 3) / math.sqrt(3)
    expected = (7 / 3 - half_width, 7 / 3 + half_width)
    assert evaluation.interval_95 == pytest.approx(expected, abs=1e-3)
    assert evaluation.to_dict()["return_interval_95"] == list(evaluation.interval_95)


def test_mean_and_std_are_the_sample_s():
    evaluation = make([1.0, 2.0, 4.0])
    assert evaluation.return_mean == pytest.approx(7 / 3)
    assert evaluation.return_std == pytest.approx(math.sqrt(7 / 3))  # divisor n - 1
    assert evaluation.length_mean == 10


def test_normalized_follows_d4rl_and_is_none_where_nothing_is_known():
    evaluation = make([3234.3, -20.272305])
    assert evaluation.normalized["mean"] == pytest.approx(50.0)
    assert evaluation.normalized["std"] == pytest.approx(100 / math.sqrt(2))
    expected = [100 * (end + 20.272305) / 3254.572305 for end in evaluation.interval_95]
    assert evaluation.normalized["interval_95"] == pytest.approx(expected)
    assert make([1.0, 2.0], "Pendulum-v1").normalized is None


@pytest.mark.parametrize("name", ["Hopper-v5", "Pendulum-v1"])
def test_references_of_ones_own_come_before_d4rls(name):
    evaluation = make([60.0, 70.0], name, references=(50.0, 250.0))
    assert evaluation.normalized["mean"] == pytest.approx(7.5)
    assert evaluation.normalized["std"] == pytest.approx(math.sqrt(50) / 2)
    expected = [(end - 50) / 2 for end in evaluation.interval_95]
    assert evaluation.normalized["interval_95"] == pytest.approx(expected)


def test_to_dict_is_strict_json_also_for_one_episode():
    for returns in ([5.0], [5.0, 6.0]):
        text = json.dumps(make(returns).to_dict(), allow_nan=False)
        assert json.loads(text)["returns"] == returns
    assert make([5.0]).to_dict()["return_std"] is None
