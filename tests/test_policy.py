"""Policies that look back: plain functions of the trace so far, checked by hand and on traces that they made."""

import math

import numpy as np
import pytest
from conftest import prompts
from test_strategies import agreeing, generate

from adaptive.drafting import Drafting
from adaptive.policy import BudgetPolicy, DecayingPolicy, Progress


def progress(tokens, blocks, depths=(1, 3, 4)):
    return Progress(depths, np.asarray(tokens), np.asarray(blocks))


def test_thresholds_decay_as_in_calm():
    policy = DecayingPolicy((0.8, math.inf), rate=4.0, length=10)
    assert not policy.asks(1)
    bars = [0.9 * 0.8 + 0.1 * math.exp(-4 * t / 10) for t in (0, 5, 10)]
    assert bars[0] > 0.8 > bars[1] > bars[2]
    for token, bar in zip((0, 5, 10), bars):
        scores = np.array([bar - 1e-6, bar + 1e-6])
        assert policy.leaves(0, scores, progress([token] * 2, [0, 0])).tolist() == [False, True]
    with pytest.raises(ValueError, match="rate"):
        DecayingPolicy((0.5,), rate=-1)


def test_a_budget_is_kept_at_every_token_and_used_up_where_scores_are_low():
    model, _ = agreeing("llama")
    for mean_depth in (1.0, 1.7, 2.9, 3.5):
        policy = BudgetPolicy((2.0, 2.0), mean_depth=mean_depth)
        out = generate(model, prompts(4), policy=policy, max_new_tokens=24)
        spent = out.trace.depth.cumsum(axis=1) / np.arange(1, 25)
        assert (spent <= mean_depth + 1e-9).all()
        assert (spent[:, -1] > mean_depth - 4 / 24).all(), "nobody leaves by score, so all of it should be used"
    for thresholds, mean_depth in (((math.inf, math.inf), 2.5), ((0.5, 0.5), math.nan), ((0.5, 0.5), 0)):
        with pytest.raises(ValueError, match="give a mean depth above 0, and where it is finite a finite threshold"):
            BudgetPolicy(thresholds, mean_depth)
    assert BudgetPolicy((math.inf, math.inf)).mean_depth == math.inf
    closed = BudgetPolicy((math.inf, 0.5), mean_depth=2.0)
    with pytest.raises(ValueError, match="first open exit is at depth 3"):
        closed.leaves(1, np.ones(1), progress([0], [0]))


def test_a_budget_by_hand():
    policy = BudgetPolicy((0.9, 0.9), mean_depth=3.0)
    # Two tokens took 5 blocks: going on to depth 3 makes 8 <= 9, to the end 9 <= 9; after 6 blocks the end is too far.
    assert policy.leaves(0, np.array([0.1, 0.1]), progress([2, 2], [5, 7])).tolist() == [False, True]
    assert policy.leaves(1, np.array([0.1, 0.1]), progress([2, 2], [5, 6])).tolist() == [False, True]
    assert policy.leaves(0, np.array([0.95]), progress([2], [0])).tolist() == [True]


def test_drafting_goes_on_while_it_pays_and_then_stops_for_good():
    segments, heads, last = [10, 20], [2], 10
    cheap = Drafting(segments, heads, last, [True])
    assert cheap.limit == 1
    for _ in range(50):  # all of three drafts kept
        for _ in range(3):
            cheap.passed(0, np.array([True]), np.array([0]))
        cheap.passed(1, np.array([False]), np.array([3]))
        cheap.told(4, 3)
    assert cheap.limit > 3 and cheap.balance > 0
    bad = Drafting(segments, heads, last, [True])
    tokens = drafts = 0
    while bad.limit and tokens < 100:
        for _ in range(bad.limit):
            bad.passed(0, np.array([True]), np.array([0]))
        drafts += bad.limit
        bad.passed(1, np.array([False]), np.array([bad.limit]))
        bad.told(1, bad.limit)
        tokens += 1
    assert 0 < drafts <= tokens < 5 and bad.balance > -2.5 * bad.full
    dear = Drafting([30, 1], [20], 10, [True])
    assert dear.limit == 0, "an exit that costs more than the full depth is not worth one draft"
