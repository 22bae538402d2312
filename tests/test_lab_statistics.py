"""The statistics of comparisons, against hand calculations, scipy's tests and simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fastsac.lab.outcome import summarize, table
from fastsac.lab.statistics import area, bootstrap, equivalence, iqm

NUMBERS = np.array([-123.0, -150.0, -118.0, -131.0, -900.0])


def test_the_interquartile_mean_leaves_a_quarter_out_at_either_end():
    assert iqm(np.array([1.0, 2.0, 3.0, 100.0])) == 2.5
    assert iqm(NUMBERS) == pytest.approx((-123 - 150 - 131) / 3)  # one of five at either end
    assert iqm(np.array([1.0, 2.0, 60.0])) == 21.0  # too few to leave one out
    assert iqm(np.array([[1.0, 2.0, 3.0, 100.0]]), axis=1) == 2.5


def test_the_area_is_the_mean_over_the_range():
    assert area(np.array([100.0, 200.0, 400.0]), np.array([0.0, 2.0, 4.0])) == pytest.approx((100 + 600) / 300)
    assert area(np.array([100.0]), np.array([7.0])) == 7.0


def test_the_bootstrap_resamples_seeds_within_environments():
    far = [np.array([0.0, 0.0, 0.0, 0.0]), np.array([10.0, 10.0, 10.0, 10.0])]
    assert bootstrap(far) == (5.0, 5.0, 5.0)  # without strata, the share of either would vary
    found = bootstrap([NUMBERS], seed=3)
    assert found == bootstrap([NUMBERS], seed=3)
    assert found.low < found.iqm < found.high
    curves = np.stack([NUMBERS, NUMBERS + 1.0], axis=1)  # [seeds, steps]: the same seeds at every step
    low, high = bootstrap([curves], seed=3)[1:]
    assert (low, high) == (pytest.approx([found.low, found.low + 1]), pytest.approx([found.high, found.high + 1]))


def test_the_interval_is_that_of_percentiles():
    """Of two seeds, a quarter of the resamples has the lower one twice, and a quarter the higher one."""
    assert bootstrap([np.array([1.0, 3.0])]) == (2.0, 1.0, 3.0)
    many = np.random.default_rng(0).normal(size=400)
    found = bootstrap([many])
    theirs = stats.bootstrap((many,), iqm, n_resamples=4000, method="percentile", random_state=1).confidence_interval
    assert (found.low, found.high) == (pytest.approx(theirs.low, abs=0.02), pytest.approx(theirs.high, abs=0.02))


def test_the_interval_covers_what_it_should():
    """Of 300 samples of 20 seeds, about 93 % of the intervals hold the true value: slightly few, as usual."""
    found = bootstrap([np.random.default_rng(5).normal(3.0, 2.0, size=(20, 300))])  # each step is a sample of its own
    covered = (found.low <= 3.0) & (found.high >= 3.0)
    assert 0.88 <= covered.mean() <= 0.97


def test_a_single_seed_has_no_interval():
    found = bootstrap([np.array([4.0]), NUMBERS])
    assert math.isfinite(found.iqm)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    curve = bootstrap([np.array([[1.0, 2.0]])]).json()
    assert curve["iqm"] == [1.0, 2.0]
    assert np.isnan(curve["low"]).all()


def test_equivalence_is_two_one_sided_paired_tests():
    rng = np.random.default_rng(1)
    a, scale, margin = rng.normal(-120, 20, size=7), 1000.0, 0.03
    b = a + rng.normal(-5, 30, size=7)
    found = equivalence(a.tolist(), b.tolist(), scale, margin)
    below = stats.ttest_rel(b / scale + margin, a / scale, alternative="greater")
    above = stats.ttest_rel(b / scale - margin, a / scale, alternative="less")
    assert found.p == pytest.approx(max(below.pvalue, above.pvalue))
    low, high = stats.ttest_rel(b / scale, a / scale).confidence_interval(0.90)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.difference == pytest.approx((b.mean() - a.mean()) / scale)
    assert (found.verdict == "equivalent") == (-margin < low and high < margin)


@pytest.mark.parametrize(
    ("other", "margin", "verdict"),
    [
        ([99.0, 100.0, 101.0, 100.0], 0.05, "equivalent"),
        ([97.9, 99.0, 97.4, 98.5], 0.05, "equivalent"),  # different, too, but by less than matters
        ([80.0, 81.0, 79.0, 80.0], 0.05, "different"),
        ([60.0, 130.0, 100.0, 95.0], 0.05, "inconclusive"),
        ([100.0], 0.05, "not tested"),
        ([], 0.05, "not tested"),
        ([math.nan, 100.0, 100.0], 0.05, "not tested"),
        ([math.inf, 100.0, 100.0], 0.05, "not tested"),
        ([-1e300, 1e300], 0.05, "not tested"),  # no finite standard error
        ([-1e100, 1e100], 0.05, "inconclusive"),
    ],
)
def test_verdicts(other, margin, verdict):
    reference = [100.0, 101.0, 99.5, 100.5][: len(other)]
    assert equivalence(reference, other, 100.0, margin).verdict == verdict


def test_what_all_runs_of_a_seed_share_is_no_difference():
    """Start states, say: each return is uncertain, and the difference is not."""
    luck = np.random.default_rng(3).normal(0.0, 0.3, size=6)
    found = equivalence(1.0 + luck, 1.001 + luck + 1e-3 * np.arange(6), 1.0, 0.01)
    assert found.verdict == "equivalent"
    assert found.high - found.low < 0.01


def test_different_is_what_a_two_sided_test_finds():
    rng, seen = np.random.default_rng(4), set()
    for _ in range(100):
        a, b = rng.normal(1.0, 0.2, size=4), rng.normal(1.3, 0.2, size=4)
        found = stats.ttest_rel(a, b).pvalue < 0.05
        verdict = equivalence(a.tolist(), b.tolist(), 1.0, 0.001).verdict
        assert verdict == ("different" if found else "inconclusive")
        seen.add(verdict)
    assert len(seen) == 2


def test_runs_that_are_all_alike_are_compared_as_they_are():
    assert equivalence([1.0, 1.0], [1.0, 1.0], 1.0, 0.05) == (0.0, 0.0, 0.0, 0.0, "equivalent", "")
    assert equivalence([1.0, 1.0], [2.0, 2.0], 1.0, 0.05).verdict == "different"


@pytest.mark.parametrize("scale", [0.0, -3.0, math.nan, math.inf])
def test_without_a_scale_nothing_is_tested(scale):
    """The reference is no better than random actions, say."""
    found = equivalence([1.0, 2.0], [1.0, 2.0], scale, 0.05)
    assert found.verdict == "not tested"
    assert ("not known" if not math.isfinite(scale) else "did not score above random actions") in found.reason
    assert math.isnan(found.p)


def test_the_verdict_equivalent_is_rarely_wrong():
    """Means that differ by the margin are called equivalent in at most 5 % of all cases."""
    rng = np.random.default_rng(2)
    pairs = rng.normal(size=(600, 2, 5)) * 0.02 + np.array([1.0, 1.05])[:, None] + rng.normal(size=(600, 1, 5))
    wrong = sum(equivalence(a, b, 1.0, 0.05).verdict == "equivalent" for a, b in pairs)
    assert wrong / 600 < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 600)


def run_of(env_id, arm, seed, values, steps=(1000, 2000, 3000)):
    return {
        **{
            "env_id": env_id,
            "arm": arm,
            "seed": seed,
            "steps": list(steps)[: len(values)],
            "eval_return": list(values),
        },
        "time_s": 10.0 + seed,
    }


def test_a_summary_by_hand():
    runs = [
        run_of("A", "pathwise", 0, [0.0, 50.0, 100.0]),
        run_of("A", "pathwise", 1, [0.0, 50.0, 120.0]),
        run_of("A", "score:none", 0, [0.0, 0.0, 50.0]),
        run_of("A", "score:none", 1, [0.0, 0.0, 60.0], steps=(1002, 2000, 3004)),
        run_of("B", "pathwise", 0, [5.0, 5.0, 9.0]),
        run_of("B", "score:none", 0, [5.0, 5.0, 9.0]),
    ]
    settings = {"arms": ["pathwise", "score:none"], "margin": 0.05}
    result = summarize(runs, [], {"A": 10.0, "B": 1.0}, "pathwise", settings)
    pathwise, none = result["summary"]["A"]["pathwise"], result["summary"]["A"]["score:none"]
    assert pathwise["final"]["iqm"] == 110.0
    assert pathwise["auc"]["values"] == [50.0, 55.0]
    assert pathwise["curve"]["iqm"] == [0.0, 50.0, 110.0]
    assert none["final"]["values"][0] == 50.0
    assert none["final"]["values"][1] == pytest.approx(60.0, rel=0.01)
    test = none["equivalence"]
    assert test["difference"] == pytest.approx((np.mean(none["final"]["values"]) - 110.0) / 100.0)
    assert (test["against"], test["seeds"]) == ("pathwise", 2)
    assert result["summary"]["B"]["score:none"]["equivalence"]["verdict"] == "not tested"  # one seed
    overall = result["overall"]["pathwise"]["final"]
    assert overall["iqm"] == pytest.approx(np.mean([0.9, 1.1, 1.0]))
    assert result["overall"]["score:none"]["final"]["iqm"] < 1.0
    lines = table({**result, "settings": settings}).splitlines()
    assert any(line.split()[:3] == ["A", "score:none", "2"] for line in lines)
    assert any(line.split() == ["B", "pathwise", "1", "9.0", "6.0", "10", "s"] for line in lines)  # no interval


def test_the_best_settings_are_those_of_the_most_complete_runs_with_the_largest_area():
    runs = [
        run_of("A", "pathwise tau=1", 0, [0.0, 1.0, 1.0]),
        run_of("A", "pathwise tau=1", 1, [0.0, 1.0, 1.0]),
        run_of("A", "pathwise tau=2", 0, [0.0, 2.0, 2.0]),
        run_of("A", "pathwise tau=2", 1, [0.0, 2.0, 2.0]),
        run_of("A", "pathwise tau=3", 0, [0.0, 9.0, 9.0]),  # its other run has failed
    ]
    settings = {"arms": ["pathwise"], "margin": 0.05}
    result = summarize(runs, [], {"A": 0.0}, "pathwise", settings)
    assert result["best"] == {"A": {"pathwise": "pathwise tau=2"}}
    assert "chosen on the same seeds" in table({**result, "settings": settings})


def test_an_arm_whose_runs_have_diverged_is_not_called_equivalent():
    """The runs that are left are a choice of the lucky ones."""
    runs = [run_of(env_id, "pathwise", seed, [0.0, 100.0 + seed]) for env_id in "AB" for seed in range(4)]
    runs += [run_of("A", "score:none", seed, [0.0, 100.0 + seed]) for seed in (0, 1)]
    runs += [run_of("B", "score:none", seed, [0.0, 100.0 + seed]) for seed in range(4)]
    lost = [{"env_id": "A", "arm": "score:none", "seed": seed, "diverged": True} for seed in (2, 3)]
    settings, random = {"arms": ["pathwise", "score:none"], "margin": 0.05}, {"A": 0.0, "B": 0.0}

    def verdicts(failed):
        result = summarize(runs, failed, random, "pathwise", settings)
        table({**result, "settings": settings})
        of = {env_id: arms["score:none"]["equivalence"] for env_id, arms in result["summary"].items()}
        return of["A"]["verdict"], of["B"]["verdict"], list(result["overall"]), of["A"]["reason"]

    assert verdicts([])[:3] == ("equivalent", "equivalent", ["pathwise", "score:none"])
    assert verdicts(lost)[:3] == ("not tested", "equivalent", ["pathwise"])
    assert "have diverged" in verdicts(lost)[3]
    crashed = [each | {"diverged": False} for each in lost]  # by no fault of the arm
    assert verdicts(crashed)[:3] == verdicts([])[:3]
    of_first = [each | {"arm": "pathwise"} for each in lost]
    assert verdicts(of_first)[:3] == ("not tested", "equivalent", ["score:none"])


def test_runs_are_paired_by_their_seeds():
    """Whatever is missing, and in whatever order it comes."""
    runs = [run_of("A", "pathwise", seed, [0.0, 0.0, 100.0 + 10.0 * seed]) for seed in (3, 0, 2, 1)]
    runs += [run_of("A", "score:none", seed, [0.0, 0.0, 101.0 + 10.0 * seed]) for seed in (2, 4, 0)]
    settings = {"arms": ["pathwise", "score:none"], "margin": 0.05}
    test = summarize(runs, [], {"A": 15.0}, "pathwise", settings)["summary"]["A"]["score:none"]["equivalence"]
    assert test["seeds"] == 2
    assert test["difference"] == pytest.approx(0.01)
    assert test["high"] - test["low"] < 1e-9


def test_no_share_of_a_gain_that_is_a_loss():
    """Where the first arm ends below random actions, its gain is no unit."""
    runs = [
        run_of(env_id, arm, seed, [0.0, end])
        for env_id, ends in (("A", (-300.0, -100.0)), ("B", (50.0, 40.0)))
        for arm, end in zip(("pathwise", "score:none"), ends, strict=True)
        for seed in (0, 1)
    ]
    settings = {"arms": ["pathwise", "score:none"], "margin": 0.05}
    result = summarize(runs, [], {"A": -200.0, "B": 0.0}, "pathwise", settings)
    assert result["overall"] == {}
    assert "not tested: the first arm did not score above random actions" in table({**result, "settings": settings})
    assert result["summary"]["A"]["score:none"]["equivalence"]["verdict"] == "not tested"


def test_no_numbers_do_not_stop_a_summary():
    runs = [
        run_of("A", "pathwise", 0, [None, 1.0, None]),
        run_of("A", "pathwise", 1, [math.nan, 1.0, math.inf]),
        run_of("A", "score:none", 0, [1.0, 2.0, 3.0]),
    ]
    settings = {"arms": ["pathwise", "score:none"], "margin": 0.05}
    result = summarize(runs, [], {"A": math.nan}, "pathwise", settings)
    assert result["summary"]["A"]["score:none"]["equivalence"]["verdict"] == "not tested"
    shown = table({**result, "settings": settings})
    assert "pathwise" in shown
    assert "nan" not in shown
    assert "best settings" not in shown
