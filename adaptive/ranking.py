"""Which thresholds to try: the frontier between cost and harm, searched on arrays that one full-depth pass gave.

What comes out is a choice, not a promise: free generation drifts away from the cached prefixes, and the prompts that
chose must not certify (see `calibration`).
"""

from typing import NamedTuple

import numpy as np

from adaptive.calibration import require


class Point(NamedTuple):
    """An operating point: mean cost per token (unit of `costs`), mean harm, thresholds [exits] (inf: never leave)."""

    cost: float
    harm: float
    thresholds: np.ndarray


class _Table(NamedTuple):
    """The search space. Exit e with cut c lets tokens with bins[e] < c leave: its threshold is thresholds[e][c]."""

    bins: np.ndarray  # [exits, tokens]
    thresholds: list  # of [cuts] per exit, cut 0 is inf
    costs: np.ndarray  # [exits + 1, tokens]; what a token adds to the mean cost relative to full depth
    harms: np.ndarray  # [exits + 1, tokens]; what a token adds to the mean harm over prompts


def predicted(thresholds, scores, harms, costs, rows=None):
    """(harm, cost): mean harm of each prompt [prompts] in ascending order of `rows`, and mean cost per token.

    A token leaves at the first exit whose score reaches its threshold, else at full depth without harm. Arrays as in
    `frontier`. Holds for the cached prefixes only: free generation drifts, hence `certify`.
    """
    scores, harms, costs, prompts = _checked_arrays(scores, harms, costs, rows)
    leaves = scores >= np.asarray(thresholds, dtype=np.float64).reshape(1, scores.shape[1])
    outcome = np.where(leaves.any(axis=1), leaves.argmax(axis=1), scores.shape[1])[:, None]
    harm = np.take_along_axis(np.pad(harms, ((0, 0), (0, 1))), outcome, axis=1)[:, 0]
    cost = float(np.take_along_axis(costs, outcome, axis=1).mean())
    return np.bincount(prompts, weights=harm) / np.bincount(prompts), cost


def frontier(scores, harms, costs, full_cost, rows=None, grid=256):
    """List of Points, cheapest first, none dominated by another.

    Minimises cost + weight * harm for a sweep of weights by coordinate descent over cuts. Cuts are ranks of observed
    scores, so a strictly monotone change of one exit's scores changes no decision.

    Args:
        scores: [tokens, exits], what each gate says of the token.
        harms: [tokens, exits] in [0, 1], the harm of leaving there.
        costs: [tokens, exits + 1], cost of a token that leaves there (last: full depth), all it passed included.
        full_cost: mean cost of a token in the plain backbone, same unit.
        rows: [tokens], the prompt of each token; None makes every token its own prompt.
        grid: most candidate thresholds per exit.
    """
    table = _tabulate(scores, harms, costs, full_cost, rows, grid)
    return [Point(cost * full_cost, harm, _chosen(table, cuts)) for cost, harm, cuts in _sweep(table)]


def rank_thresholds(scores, harms, costs, full_cost, risk, rows=None, grid=256):
    """Thresholds [exits] (inf: never leave) of least mean cost with a mean harm of at most `risk`; see `frontier`."""
    table = _tabulate(scores, harms, costs, full_cost, rows, grid)
    return _polish(table, lambda cost, harm: np.where(harm <= risk + 1e-12, cost, 1e3 + harm))


def rank_budget(scores, harms, costs, full_cost, budget, rows=None, grid=256):
    """Thresholds [exits] (inf: never leave) of least mean harm with a mean cost of at most `budget` * `full_cost`.

    Raises:
        ValueError: the exits cannot keep within the budget.
    """
    table = _tabulate(scores, harms, costs, full_cost, rows, grid)
    thresholds = _polish(table, lambda cost, harm: np.where(cost <= budget + 1e-12, harm, 1e3 + cost))
    cost = predicted(thresholds, scores, harms, costs, rows)[1] / full_cost
    require(
        "raise the budget, or train earlier or cheaper exits",
        (cost <= budget + 1e-9, f"`budget` is {budget} of full depth; allowed: at least {cost:.3f}"),
    )
    return thresholds


def auc(scores, true) -> float | None:
    """Returns the probability that a true one scores above a false one, ties counting half; None without both."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive, negative = int(true.sum()), int((~true).sum())
    if not positive or not negative:
        return None
    return float((ranks[true].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _checked_arrays(scores, harms, costs, rows):
    """The arrays as float64, and the prompt of each token as a number from 0 on."""
    scores, harms, costs = (np.asarray(array, dtype=np.float64) for array in (scores, harms, costs))
    rows = np.arange(len(scores)) if rows is None else np.asarray(rows)
    fits = scores.ndim == 2 and scores.size and harms.shape == scores.shape and rows.shape == scores.shape[:1]
    fits = fits and costs.shape == (len(scores), scores.shape[1] + 1)
    sound = not np.isnan(scores).any() and np.all((harms >= 0) & (harms <= 1)) and np.isfinite(costs).all()
    require(
        "give the arrays of one cached pass",
        (
            fits,
            f"shapes are `scores` {scores.shape}, `harms` {harms.shape}, `costs` {costs.shape}, `rows` "
            f"{rows.shape}; allowed: [tokens, exits] twice, [tokens, exits + 1], [tokens]; not empty",
        ),
        (sound, "values out of range; allowed: `harms` in [0, 1], finite `costs`, no NaN in `scores`"),
    )
    return scores, harms, costs, np.unique(rows, return_inverse=True)[1]


def _tabulate(scores, harms, costs, full_cost, rows, grid):
    scores, harms, costs, prompts = _checked_arrays(scores, harms, costs, rows)
    assert grid >= 1 and full_cost > 0
    bins, thresholds, picks = [], [], np.linspace(0, len(scores) - 1, grid).round().astype(int)
    for column in scores.T:
        candidates = np.unique(np.sort(column)[picks])[::-1]
        bins.append(np.searchsorted(-candidates, -column))
        thresholds.append(np.append(np.inf, candidates))
    sizes = np.bincount(prompts)
    shares = harms / (len(sizes) * sizes[prompts])[:, None]
    return _Table(
        np.array(bins),
        thresholds,
        (costs / (len(scores) * full_cost)).T.copy(),
        np.pad(shares, ((0, 0), (0, 1))).T.copy(),
    )


def _chosen(table, cuts):
    return np.array([table.thresholds[e][cut] for e, cut in enumerate(cuts)])


def _line(table, cuts, e):
    """[cost [cuts], harm [cuts]]: what every cut of exit e gives while the other exits keep theirs."""
    outcome = np.full(table.bins.shape[1], len(cuts))
    for other in reversed([other for other in range(len(cuts)) if other != e]):
        outcome = np.where(table.bins[other] < cuts[other], other, outcome)
    lines, places = [], outcome * len(outcome) + np.arange(len(outcome))
    for values in (table.costs, table.harms):
        without = values.take(places)
        gained = (outcome > e) * (values[e] - without)
        change = np.bincount(table.bins[e], weights=gained, minlength=len(table.thresholds[e]) - 1)
        lines.append(without.sum() + np.append(0, np.cumsum(change)))
    return lines


def _descend(table, cuts, objective):
    """(cuts, value of the objective) that changing the cut of any one exit does not improve."""
    cuts, last = list(cuts), None
    while cuts != last:
        last = list(cuts)
        for e in range(len(cuts)):
            values = objective(*_line(table, cuts, e))
            if values.min() < values[cuts[e]] - 1e-12:  # a margin, lest rounding moves a cut to and fro for ever
                cuts[e] = int(values.argmin())
    return tuple(cuts), values[cuts[e]]


def _sweep(table):
    """Undominated (relative cost, harm, cuts) met while the weight of harm falls and rises again, cheapest first."""
    weights = np.geomspace(300, 0.03, 41)
    cuts = (0,) * len(table.bins)
    found = {cuts}
    for weight in np.append(weights, weights[::-1]):
        cuts, _ = _descend(table, cuts, lambda cost, harm, weight=weight: cost + weight * harm)
        found.add(cuts)
    rated = sorted((*(float(line[cuts[0]]) for line in _line(table, cuts, 0)), cuts) for cuts in found)
    return [point for i, point in enumerate(rated) if all(point[1] < cheaper[1] - 1e-12 for cheaper in rated[:i])]


def _polish(table, objective):
    """Thresholds of the best end of all descents: the sweep sees the convex hull only, they reach what lies between."""
    ends = [_descend(table, cuts, objective) for _, _, cuts in _sweep(table)]
    return _chosen(table, min(ends, key=lambda end: (end[1], end[0]))[0])
