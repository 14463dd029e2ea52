"""Bounds hold as often as they say, thresholds are near the exhaustive optimum, certificates survive the disk."""

import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest

from adaptive import calibration
from adaptive.calibration import BOUNDS, Certificate, certify, needed_prompts
from adaptive.ranking import frontier, predicted, rank_budget, rank_thresholds


def beta(mean, deviation):
    """Sampler of losses [n] with this mean and standard deviation."""
    strength = mean * (1 - mean) / deviation**2 - 1
    return lambda rng, n: rng.beta(mean * strength, (1 - mean) * strength, n)


def mixture(share, a, b):
    """Sampler of losses [n] that are 0 but for a share drawn from Beta(a, b)."""
    return lambda rng, n: (rng.random(n) < share) * rng.beta(a, b, n)


LOSSES = {  # name: sampler, true mean
    "bernoulli 0.03": (lambda rng, n: (rng.random(n) < 0.03) * 1.0, 0.03),
    "bernoulli 0.5": (lambda rng, n: (rng.random(n) < 0.5) * 1.0, 0.5),
    "zero-inflated beta": (mixture(0.1, 1, 4), 0.02),
    "rare disaster": (lambda rng, n: np.where(rng.random(n) < 0.025, 1.0, 0.01), 0.01 + 0.025 * 0.99),
    "beta": (beta(0.3, 0.25), 0.3),
}


@pytest.mark.parametrize("bound", ["wsr", "hb"])
@pytest.mark.parametrize("name", LOSSES)
def test_bound_is_violated_at_most_delta(bound, name):
    sampler, mean = LOSSES[name]
    rng, delta, draws = np.random.default_rng(1), 0.1, 1000
    violations = sum(BOUNDS[bound](sampler(rng, 100), delta) < mean for _ in range(draws))
    slack = 3 * math.sqrt(delta * (1 - delta) / draws)  # three standard deviations of a rate of exactly delta
    assert violations / draws <= delta + slack


def test_wsr_is_where_the_capital_crosses():
    """A slow capital, written anew, agrees, and rejects every mean above the bound and none below."""
    rng, delta, n = np.random.default_rng(2), 0.05, 40
    for sampler, _ in LOSSES.values():
        losses = sampler(rng, n)
        bound = calibration.wsr_bound(losses, delta)
        for m in (0.01, 0.1, bound - 1e-6, bound, bound + 1e-6, 0.3, 0.5, 0.9):
            capital, most = 1.0, 1.0
            for i, loss in enumerate(losses):
                past = losses[:i]
                means = [(0.5 + past[: j + 1].sum()) / (j + 2) for j in range(i)]
                variance = (0.25 + sum((x - y) ** 2 for x, y in zip(past, means, strict=True))) / (i + 1)
                capital *= 1 + min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 0.99 / (1 - m)) * (m - loss)
                most = max(most, capital)
            assert (most >= 1 / delta) == (m >= bound)


def test_hoeffding_bentkus_solves_its_equation():
    rng, delta = np.random.default_rng(3), 0.05
    assert calibration.hoeffding_bentkus_bound(np.zeros(149), delta) == pytest.approx(1 - delta ** (1 / 149), rel=1e-5)
    for sampler, _ in LOSSES.values():
        losses = sampler(rng, 80)
        mean, m = losses.mean(), calibration.hoeffding_bentkus_bound(losses, delta)
        tail = sum(math.comb(80, k) * m**k * (1 - m) ** (80 - k) for k in range(math.ceil(80 * mean - 1e-9) + 1))
        divergence = (mean * math.log(mean / m) if mean else 0) + (1 - mean) * math.log((1 - mean) / (1 - m))
        assert min(math.exp(-80 * divergence), math.e * tail) == pytest.approx(delta, rel=1e-4)


def test_hoeffding_bentkus_counts_no_rounding_as_a_failure():
    spread, whole = np.full(30, 0.1), np.append(np.ones(3), np.zeros(27))
    assert spread.mean() * 30 > 3
    assert calibration.hoeffding_bentkus_bound(spread, 0.05) == calibration.hoeffding_bentkus_bound(whole, 0.05)


def test_crc_is_the_inflated_mean_and_ignores_delta():
    losses = [0.0, 0.5, 0.25]
    assert calibration.crc_bound(losses, 0.05) == calibration.crc_bound(losses, 0.5) == pytest.approx(1.75 / 4)


def test_wsr_needs_fewer_prompts_than_hoeffding_bentkus():
    rng, sampler, sizes = np.random.default_rng(4), beta(0.03, 0.03), range(60, 900, 30)
    smallest = {"wsr": [], "hb": []}
    for _ in range(25):
        losses = sampler(rng, 900)
        for bound, found in smallest.items():
            found.append(next((n for n in sizes if BOUNDS[bound](losses[:n], 0.05) <= 0.05), 900))
        assert BOUNDS["wsr"](losses[:300], 0.05) < BOUNDS["hb"](losses[:300], 0.05)
    assert 2 * np.median(smallest["wsr"]) < np.median(smallest["hb"])


@pytest.mark.parametrize("mean, deviation, n, power", [(0.003, 0.01, 200, 0.8), (0.012, 0.03, 400, 0.3)])
def test_wsr_has_power_near_zero_harm(mean, deviation, n, power):
    rng, sampler = np.random.default_rng(5), beta(mean, deviation)
    passed = [certify(sampler(rng, n), 0.02, 0.05, generator=rng)[0] for _ in range(120)]
    assert np.mean(passed) >= power


@pytest.mark.parametrize("bound, most", [("wsr", 155), ("hb", 149), ("crc", 49)])
def test_needed_prompts_is_the_first_number_that_certifies(bound, most):
    n = needed_prompts(0.02, 0.05, bound)
    assert n <= most and (bound == "crc" or n >= math.log(20) / -math.log(0.98))
    rng = np.random.default_rng(0)
    assert certify(np.zeros(n), 0.02, 0.05, bound, generator=rng)[0]
    assert not certify(np.zeros(n - 1), 0.02, 0.05, bound, generator=rng)[0]
    assert certify([1.0, 0.9], 1.0, 0.05, bound, generator=rng) == (True, pytest.approx(1, abs=0.05))


def test_certify_shuffles():
    """Prompts sorted by harm would win the bets before the first loss is seen."""
    losses = np.append(np.zeros(200), np.ones(100))
    assert calibration.wsr_bound(losses, 0.05) <= 0.02
    passed, upper = certify(losses, 0.02, 0.05, generator=np.random.default_rng(0))
    assert not passed and upper > 1 / 3
    assert upper == certify(losses, 0.02, 0.05, generator=np.random.default_rng(0))[1]


def test_spend_sums_to_delta():
    assert calibration.spend(0.05, 2) == pytest.approx([0.0375, 0.0125])
    assert [sum(calibration.spend(0.1, attempts)) for attempts in (1, 3, 5)] == pytest.approx([0.1] * 3)


def test_bad_targets_are_refused_all_at_once():
    with pytest.raises(ValueError, match="`losses`.*`delta` is 0;.*`epsilon` is 2;.*`bound` is 'wrs'.*wsr, hb, crc"):
        certify([0.5, 1.5], 2, 0, "wrs", generator=np.random.default_rng(0))
    with pytest.raises(ValueError, match="`losses`"):
        calibration.wsr_bound([0.1, math.nan], 0.05)
    with pytest.raises(ValueError, match="`losses`"):
        calibration.hoeffding_bentkus_bound([], 0.05)


def problem(seed, tokens, exits, prompts):
    """(scores, harms, costs, rows) in which deeper exits harm less and scores tell a part of it."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=tokens)[:, None] + 0.8 * np.arange(exits)
    scores = 1 / (1 + np.exp(-(ease + rng.normal(size=(tokens, exits)))))
    harms = (rng.random((tokens, exits)) < 1 / (1 + np.exp(3 * ease))) * rng.random((tokens, exits))
    costs = np.append((1 + np.arange(exits)) / (exits + 1), 1.02) * (1 + 0.1 * rng.random((tokens, 1)))
    return scores, harms, costs, rng.integers(0, prompts, tokens)


def rates(thresholds, scores, harms, costs, rows):
    """(mean harm over prompts, mean cost), token by token."""
    per_prompt, total = {}, 0.0
    for i in range(len(scores)):
        e = next((e for e in range(scores.shape[1]) if scores[i, e] >= thresholds[e]), None)
        per_prompt.setdefault(rows[i], []).append(0.0 if e is None else harms[i, e])
        total += costs[i, -1 if e is None else e]
    return np.mean([np.mean(harm) for harm in per_prompt.values()]), total / len(scores)


def test_predicted_counts_each_prompt_once():
    scores, harms = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.1]]), np.array([[1.0, 0.5], [0.7, 0.4], [1.0, 1.0]])
    costs = np.array([[1.0, 2.0, 3.0]] * 3)
    harm, cost = predicted([0.5, 0.8], scores, harms, costs, rows=[7, 7, 3])
    assert harm == pytest.approx([0.0, 0.7]) and cost == pytest.approx(2.0)
    assert predicted([np.inf, np.inf], scores, harms, costs)[0].tolist() == [0, 0, 0]
    arrays = problem(0, 200, 3, 9)
    harm, cost = predicted([0.8, 0.7, 0.6], *arrays)
    assert (harm.mean(), cost) == pytest.approx(rates([0.8, 0.7, 0.6], *arrays))


def test_thresholds_come_near_the_exhaustive_optimum():
    gaps = []
    for seed in range(6):
        scores, harms, costs, rows = arrays = problem(seed, 60, 2, 10)
        first, second = ((column >= np.append(np.unique(column), np.inf)[:, None]) * 1.0 for column in scores.T)
        weight = (1 / np.bincount(rows)[rows] / len(set(rows)))[:, None]
        points = [
            (first * now.T) @ np.ones((60, 61)) + (1 - first) @ (second.T * then + (1 - second.T) * last)
            for now, then, last in ((harms[:, :1] * weight, harms[:, 1:] * weight, 0), np.hsplit(costs / 60, 3))
        ]
        points = list(zip(*(values.ravel() for values in points), strict=True))
        for risk in (0.0, 0.02, 0.05, 0.1):
            harm, cost = rates(rank_thresholds(scores, harms, costs, 1.0, risk, rows), *arrays)
            assert harm <= risk + 1e-9
            gaps.append(cost - min(c for h, c in points if h <= risk + 1e-9))
        for budget in (0.95, 0.7, 0.5):
            harm, cost = rates(rank_budget(scores, harms, costs, 1.0, budget, rows), *arrays)
            assert cost <= budget + 1e-9
            gaps.append(harm - min(h for h, c in points if c <= budget + 1e-9))
    # In relative cost and in harm; a single one of 60 tokens moves either by about 0.01.
    assert min(gaps) > -1e-9 and max(gaps) < 0.03 and np.mean(gaps) < 0.005


def test_monotone_reparametrisation_changes_no_decision():
    scores, harms, costs, rows = problem(1, 3000, 3, 40)
    warped = np.stack([scores[:, 0] ** 3, np.log(scores[:, 1]) / 50 + 1, 0.2 * scores[:, 2]], axis=1)
    for rank, goal in ((rank_thresholds, 0.02), (rank_thresholds, 0.1), (rank_budget, 0.7)):
        plain = rank(scores, harms, costs, 1.0, goal, rows)
        bent = rank(warped, harms, costs, 1.0, goal, rows)
        assert np.array_equal(scores >= plain, warped >= bent)
        assert all(t in column for t, column in zip(plain, scores.T, strict=True) if np.isfinite(t))
        assert (scores >= plain).any() and np.array_equal(plain, rank(scores, harms, costs, 1.0, goal, rows))


def test_frontier_falls_and_ranking_beats_it():
    scores, harms, costs, rows = arrays = problem(2, 20000, 4, 200)
    start = time.process_time()
    thresholds = rank_thresholds(scores, harms, costs, 2.0, 0.02, rows)
    assert time.process_time() - start < 4  # seconds; 0.5 here
    points = frontier(scores, harms, costs, 2.0, rows)
    assert len(points) > 10
    assert all(a.cost < b.cost and a.harm > b.harm for a, b in zip(points, points[1:], strict=False))
    for point in points[::5]:
        harm, cost = predicted(point.thresholds, *arrays)
        assert (point.harm, point.cost) == pytest.approx((harm.mean(), cost))
    harm, cost = predicted(thresholds, *arrays)
    assert harm.mean() <= 0.02 and cost <= min(point.cost for point in points if point.harm <= 0.02) + 1e-9


def test_exit_that_always_harms_is_never_taken():
    scores, harms, costs, rows = problem(3, 500, 2, 10)
    harms[:, 0] = 1.0
    thresholds = rank_thresholds(scores, harms, costs, 1.0, 0.001, rows)
    assert thresholds[0] == np.inf and np.isfinite(thresholds[1])
    assert rank_thresholds(scores, np.ones_like(harms), costs, 1.0, 0.0).tolist() == [np.inf, np.inf]


def test_tied_scores_leave_together():
    scores, harms, costs, rows = problem(4, 500, 2, 10)
    scores = scores.round(1)
    thresholds = rank_thresholds(scores, harms, costs, 1.0, 0.03, rows)
    assert rates(thresholds, scores, harms, costs, rows)[0] <= 0.03 and np.isfinite(thresholds).any()


def test_bad_arrays_and_budgets_are_refused():
    scores, harms, costs, rows = problem(5, 50, 2, 5)
    with pytest.raises(ValueError, match=r"shapes are .*`costs` \(50, 2\)"):
        rank_thresholds(scores, harms, costs[:, :2], 1.0, 0.1, rows)
    with pytest.raises(ValueError, match="out of range"):
        rank_thresholds(scores, harms + 1, costs, 1.0, 0.1, rows)
    with pytest.raises(ValueError, match=r"`budget` is 0.1 of full depth; allowed: at least 0\.3"):
        rank_budget(scores, harms, costs, 1.0, 0.1, rows)


def test_whole_procedure_errs_at_most_delta():
    """Select on some prompts, try a bold and a safe target on others: a certified risk is seldom above epsilon."""
    epsilon, delta, rng = 0.05, 0.1, np.random.default_rng(6)
    world = [array.reshape(400, 8, -1) for array in problem(7, 3200, 2, 1)[:3]]  # 400 prompts of 8 tokens
    everyone = [array.reshape(3200, -1) for array in world]
    runs, wrong, passes, bold = 0, 0, 0, 0
    for _ in range(12):
        chosen, rows = rng.integers(0, 400, 200), np.repeat(np.arange(200), 8)
        some = [array[chosen].reshape(1600, -1) for array in world]
        tried = [rank_thresholds(*some, 1.0, risk, rows, 64) for risk in (1.1 * epsilon, epsilon / 4)]
        harms = [predicted(thresholds, *everyone, np.repeat(np.arange(400), 8))[0] for thresholds in tried]
        for _ in range(60):
            runs, prompts = runs + 1, rng.integers(0, 400, 150)
            for harm, share in zip(harms, calibration.spend(delta, 2), strict=True):
                bold += harm.mean() > epsilon
                if certify(harm[prompts], epsilon, share, generator=rng)[0]:
                    passes, wrong = passes + 1, wrong + (harm.mean() > epsilon)
                    break
    assert wrong / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert passes / runs > 0.5 and bold / runs > 0.2, (passes, bold)  # it certifies often, and there was much to refuse


def certificate():
    return Certificate(
        kind="risk",
        epsilon=0.02,
        delta=0.05,
        n=200,
        bound="wsr",
        certified=0.0187,
        mean=0.004,
        harm="regret",
        max_new_tokens=64,
        tolerance=0.25,
        floor=None,
        thresholds=[0.9, math.inf, 0.5],
        saved=0.3,
        predicted={"harm": 0.003},
        seed=0,
        data_digest="d1",
        model_digest="m1",
        versions={"numpy": "2"},
    )


def test_certificate_comes_back_from_strict_json(tmp_path):
    path, first = tmp_path / "certificate.json", certificate()
    dataclasses.replace(first, n=np.int64(200), thresholds=np.array([0.9, np.inf, 0.5])).save(path)
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values["thresholds"] == [0.9, None, 0.5] and Certificate.load(path) == first
    with pytest.raises(ValueError):
        dataclasses.replace(first, mean=math.nan).save(path)
    assert Certificate.load(path) == first and [p.name for p in tmp_path.iterdir()] == ["certificate.json"]


def test_failed_write_leaves_the_earlier_certificate(tmp_path, monkeypatch):
    path = tmp_path / "certificate.json"
    certificate().save(path)

    def full(self, text, encoding):
        self.write_bytes(text[:9].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(certificate(), n=999).save(path)
    assert Certificate.load(path) == certificate() and len(list(tmp_path.iterdir())) == 1


def test_certificate_refuses_what_it_does_not_know(tmp_path):
    path, values = tmp_path / "certificate.json", dataclasses.asdict(certificate()) | {"thresholds": [None]}
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "bound"} | {"epsilom": 1}))
    with pytest.raises(ValueError, match=r"unknown keys \['epsilom'\] and lacks \['bound'\]; allowed: .*calibrate"):
        Certificate.load(path)
    for text in ("{", "[1]", "\xff", json.dumps(values | {"mean": math.nan})):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="is no certificate"):
            Certificate.load(path)


def test_certificate_warns_on_other_weights():
    assert certificate().check("m1") is None
    assert "m1" in certificate().check("m2") and "m2" in certificate().check("m2")


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    assert calibration.rouge_l([1, 2, 3, 4], [1, 9, 3, 4, 4]) == pytest.approx(2 * 3 / 9)
    assert [calibration.rouge_l(a, b) for a, b in (([], []), ([1], []), ([], [1]), ([5, 6], [5, 6]))] == [1, 0, 0, 1]
    rng = np.random.default_rng(8)
    for _ in range(30):
        a, b = rng.integers(0, 5, rng.integers(1, 90)), rng.integers(0, 5, rng.integers(1, 90))
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        assert calibration.rouge_l(a, b) == pytest.approx(2 * table[-1, -1] / (len(a) + len(b)))
