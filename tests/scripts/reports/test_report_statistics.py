import itertools
import math
import statistics

import numpy as np
import pytest

from minrl.scripts.reports.statistics import (
    MISSES,
    bootstrap_interval,
    interquartile_mean,
    mean_over_tasks,
    performance_profile,
    probability_of_improvement,
    student_interval,
)

# By task, runs; multiples of 1/8 are summed without rounding, whatever the order.
SHAPES = ((3, 3, 3), (5, 4, 7))


def scores_of(shape, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 800, size=runs) / 8 for runs in shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_interquartile_mean_leaves_out_a_quarter_at_either_end(shape):
    scores = scores_of(shape)
    ordered = sorted(score for task in scores for score in task)
    cut = int(0.25 * len(ordered))
    middle = ordered[cut : len(ordered) - cut]
    assert interquartile_mean(scores) == sum(middle) / len(middle)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_profile_is_the_share_of_runs_above_each_threshold(shape):
    scores = scores_of(shape)
    thresholds = np.array([0.0, 20.0, scores[0][0], 60.0, 100.0])
    expected = [
        sum(sum(score > limit for score in task) / len(task) for task in scores) / len(scores)
        for limit in thresholds
    ]
    np.testing.assert_allclose(performance_profile(scores, thresholds), expected, rtol=1e-12)


def test_probability_of_improvement_counts_pairs_and_half_of_ties():
    ours, rival = [np.array([1.0, 2.0, 2.0]), np.array([5.0, 1.0])], [np.array([2.0, 0.0]), [3.0]]
    rival = [np.array(task) for task in rival]
    by_task = [
        sum((a > b) + 0.5 * (a == b) for a in own for b in other) / (len(own) * len(other))
        for own, other in zip(ours, rival, strict=True)
    ]
    assert probability_of_improvement(ours, rival) == sum(by_task) / 2
    assert probability_of_improvement(ours, ours) == 0.5


def test_the_interval_is_that_of_all_possible_draws():
    scores = [np.array([1.0, 2.0, 4.0]), np.array([0.0, 3.0, 9.0])]
    draws = [list(itertools.product(task, repeat=3)) for task in scores]
    means = [(sum(a) / 3 + sum(b) / 3) / 2 for a, b in itertools.product(*draws)]
    low, high = bootstrap_interval(mean_over_tasks, scores, repetitions=20_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.1)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.1)


def test_a_single_run_of_some_task_has_no_interval():
    assert bootstrap_interval(mean_over_tasks, [np.array([1.0, 2.0]), np.array([3.0])]) is None


def test_the_same_runs_give_the_same_interval():
    scores = scores_of((3, 3))
    assert bootstrap_interval(mean_over_tasks, scores) == bootstrap_interval(
        mean_over_tasks, scores
    )


def student_density(t, degrees):
    gamma = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    return (
        math.exp(gamma)
        / math.sqrt(degrees * math.pi)
        * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    )


@pytest.mark.parametrize("runs", [(3,), (3, 3, 3), (5, 2, 4)])
def test_the_interval_of_a_mean_over_tasks_is_welchs(runs):
    random = np.random.default_rng(0)
    scores = [random.normal(10 * task, 1 + task, count) for task, count in enumerate(runs)]
    squares = [statistics.variance(task.tolist()) / len(task) for task in scores]
    terms = [square**2 / (count - 1) for square, count in zip(squares, runs, strict=True)]
    degrees = sum(squares) ** 2 / sum(terms)
    low, high = student_interval(scores)
    assert (low + high) / 2 == pytest.approx(
        sum(task.sum() / len(task) for task in scores) / len(runs)
    )
    # The t of its ends leaves 95 % between them.
    end = (high - low) / 2 * len(runs) / math.sqrt(sum(squares))
    t = np.linspace(-end, end, 20_001)
    assert np.trapezoid(student_density(t, degrees), t) == pytest.approx(0.95, abs=1e-4)


def test_the_interval_of_a_mean_of_equal_or_single_runs():
    assert student_interval([np.array([2.0, 2.0]), np.array([4.0, 4.0])]) is None
    assert student_interval([np.array([1.0, 2.0]), np.array([3.0])]) is None


# Other degrees of freedom in every study of three tasks: each takes some 20 ms to integrate.
STUDIES = [
    pytest.param(1, 400, id="1-400"),
    pytest.param(3, 2000, marks=pytest.mark.slow, id="3-2000"),
]


@pytest.mark.parametrize(("tasks", "studies"), STUDIES)
def test_one_in_twenty_differences_of_nothing_looks_like_something(tasks, studies):
    random = np.random.default_rng(0)
    found = 0
    for _ in range(studies):
        low, high = student_interval(list(random.normal(size=(tasks, 3))))
        found += low > 0 or high < 0
    # Welch's degrees of freedom are estimated, so that with several tasks it is rather less.
    least = 0.05 if tasks == 1 else 0.03
    noise = 3 * math.sqrt(0.05 * 0.95 / studies)
    assert least - noise < found / studies < 0.05 + noise


SPREADS = {"alike": np.ones(9), "on a few": np.array([1, 13, 16, 0.3, 2.5, 1, 0.2, 6, 2])}


def share_of_misses(means, spreads, seeds, studies=600):
    """Return how often the interval of an interquartile mean misses what it is of."""
    random = np.random.default_rng(0)

    def draw(runs):
        return means[:, None] + spreads[:, None] * random.standard_normal((len(means), runs))

    truth, missed = interquartile_mean(list(draw(20_000))), 0
    for _ in range(studies):
        low, high = bootstrap_interval(interquartile_mean, list(draw(seeds)), repetitions=500)
        missed += not low <= truth <= high
    return missed / studies


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_miss_as_often_as_the_report_says(seeds):
    said = MISSES[seeds, 9][0]
    assert share_of_misses(np.linspace(0, 4, 9), SPREADS["alike"], seeds) == pytest.approx(
        said, abs=0.03
    )
    uneven = share_of_misses(np.linspace(0, 60, 9), SPREADS["on a few"], seeds)
    assert 1.2 * said < uneven < 2.7 * said


# Against rliable: point estimates are equal; intervals, which are drawn, agree to a percent point.
PERCENT_POINT = 1.0


@pytest.fixture
def rliable():
    pytest.importorskip("rliable")
    from rliable import library, metrics

    np.random.seed(0)
    return library, metrics


@pytest.mark.parametrize("name", ["aggregate_iqm", "aggregate_mean"])
def test_aggregates_agree_with_rliable(rliable, name):
    library, metrics = rliable
    ours = {"aggregate_iqm": interquartile_mean, "aggregate_mean": mean_over_tasks}[name]
    scores = scores_of((5,) * 6)
    points, intervals = library.get_interval_estimates(
        {"method": np.array(scores).T},
        lambda runs: np.array([getattr(metrics, name)(runs)]),
        reps=2000,
    )
    assert ours(scores) == points["method"][0]
    found = bootstrap_interval(ours, scores)
    np.testing.assert_allclose(found, intervals["method"][:, 0], atol=PERCENT_POINT)


def test_probability_of_improvement_agrees_with_rliable(rliable):
    library, metrics = rliable
    ours, rival = scores_of((4,) * 4), scores_of((4,) * 4, seed=1)
    rival[0][:2] = ours[0][:2]  # ties
    points, intervals = library.get_interval_estimates(
        {"pair": (np.array(ours).T, np.array(rival).T)},
        lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
        reps=400,
    )
    assert probability_of_improvement(ours, rival) == points["pair"][0]
    found = bootstrap_interval(probability_of_improvement, ours, rival)
    np.testing.assert_allclose(found, intervals["pair"][:, 0], atol=PERCENT_POINT / 25)


def test_profiles_agree_with_rliable(rliable):
    library, _ = rliable
    scores, thresholds = scores_of((4,) * 6), np.linspace(0, 100, 11)
    points, intervals = library.create_performance_profile(
        {"method": np.array(scores).T}, thresholds, reps=500
    )
    np.testing.assert_allclose(
        performance_profile(scores, thresholds), points["method"], rtol=1e-12
    )
    found = bootstrap_interval(lambda drawn: performance_profile(drawn, thresholds), scores)
    np.testing.assert_allclose(found, intervals["method"], atol=1 / 24)
