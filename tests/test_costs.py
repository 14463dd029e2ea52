"""Prices against hand-made numbers."""

import numpy as np
import pytest

from adaptive.costs import Costs
from adaptive.policy import Trace

BLOCKS = [
    {"weights": 100, "fill": 30, "attention": 8, "kv": 6, "window": None},
    {"weights": 200, "fill": 50, "attention": 10, "kv": 4, "window": 3},
]
SHAPE = {"layers": 2, "hidden": 4, "vocab": 400, "bytes_per_weight": 4, "blocks": BLOCKS}
PLAIN = {"depth": 1, "head": 7, "vocab": 80, "gate": 5, "blocks": [], "own_kv": False, "reads_logits": False}
OWN = {"depth": 1, "head": 0, "vocab": 400, "gate": 5, "blocks": [BLOCKS[1]], "own_kv": True, "reads_logits": False}
NAN = float("nan")


def one_row(taken, context, *, scores, headed, caught_up=None, exits=(1,), layers=2):
    """A trace of one row: `taken` and `context` per token, the others per token and exit."""
    count = (1, len(taken), len(exits))
    return Trace(
        exits,
        layers,
        np.array([taken]),
        np.array(scores, float).reshape(count),
        np.array([context]),
        np.array(headed, bool).reshape(count),
        np.array(caught_up or [0] * len(scores)).reshape(count),
        np.array([context[0]]),
    )


def test_a_token_at_full_depth_one_that_left_and_a_row_that_ended():
    trace = one_row([1, 0, 1, -1], [4, 5, 6, 0], scores=[0.1, 0.9, NAN, NAN], headed=[0, 1, 0, 0])
    price = Costs(SHAPE, [PLAIN]).price(trace)
    first = 2 * 400 + 2 * 5
    left = 2 * (100 + 8 * 5) + 2 * 50 + 2 * 5 + 2 * (7 + 80)
    last = 2 * (100 + 8 * 6) + 2 * (200 + 10 * 3) + 2 * 400
    assert price.flops.tolist() == [[first, left, last, 0]]
    full = 2 * (100 + 8 * 5) + 2 * (200 + 10 * 3) + 2 * 400
    assert price.full_flops.tolist() == [[800, full, last, 0]]
    assert price.breakdown == {
        "blocks": 200 + 600,
        "attention": 80 + 96 + 60,
        "fill": 100,
        "gates": 20,
        "heads": 800 + 174 + 800,
        "catch_up": 0,
        "waiting": 0,
        "rejected": 0,
    }
    assert sum(price.breakdown.values()) == price.flops.sum()
    assert price.relative_flops == price.flops.sum() / price.full_flops.sum()
    moved = [5 + 400, 100 + 6 * 5 + 6 + 50 + 4 + 5 + 87, 100 + 6 * 6 + 6 + 200 + 4 * 3 + 4 + 400, 0]
    assert price.bytes.tolist() == [[4 * numbers for numbers in moved]]
    assert price.full_bytes.tolist() == [[1600, 4 * (100 + 6 * 5 + 6 + 200 + 4 * 3 + 4 + 400), 4 * moved[2], 0]]
    assert price.relative_bytes == price.bytes.sum() / price.full_bytes.sum()


def test_savings_are_owed_to_depth_or_shortlist_and_add_up():
    trace = one_row([1, 0, 1], [4, 5, 6], scores=[0.1, 0.9, 0.2], headed=[0, 1, 0])
    price = Costs(SHAPE, [PLAIN]).price(trace)
    total = price.full_flops.sum()
    assert price.saved["depth"] == pytest.approx((2 * (200 + 10 * 3) - 2 * 50) / total)
    assert price.saved["shortlist"] == pytest.approx(2 * (400 - 80) / total)
    assert price.saved["overhead"] == pytest.approx(-(3 * 2 * 5 + 2 * 7) / total)
    assert sum(price.saved.values()) == pytest.approx(1 - price.relative_flops)


def test_a_block_head_with_its_own_keys_pays_for_the_tokens_that_passed_it_by():
    trace = one_row(
        [1, 0, 1, 0], [4, 5, 6, 7], scores=[0.1, 0.9, 0.1, 0.9], headed=[0, 1, 0, 1], caught_up=[0, 5, 0, 2]
    )
    price = Costs(SHAPE, [OWN]).price(trace)
    per_token = {context: 2 * 200 + 2 * 10 * min(context, 3) for context in range(1, 8)}
    left = 2 * (100 + 8 * 5) + 2 * 50 + 2 * 5 + 2 * 400
    assert price.flops[0, 1] == left + sum(per_token[context] for context in (1, 2, 3, 4, 5))
    assert price.flops[0, 3] == left + 2 * 8 * 2 + per_token[6] + per_token[7]
    assert price.breakdown["catch_up"] == sum(per_token[context] for context in (1, 2, 3, 4, 6))
    # One pass of 2 columns at context 7: weights once, K/V of the 3 + 1 tokens that either sees, 2 written.
    assert price.bytes[0, 3] == 4 * (100 + 6 * 7 + 6 + 50 + 4 + 5 + 400 + 200 + 4 * 4 + 2 * 4)
    assert price.saved["shortlist"] == 0


def test_neighbours_in_a_batch_can_make_a_row_catch_up_padding_included():
    trace = one_row([1, 1], [2, 3], scores=[0.1, 0.1], headed=[0, 0], caught_up=[5, 1])
    price = Costs(SHAPE, [OWN]).price(trace)
    assert price.breakdown["catch_up"] == 6 * 2 * 200 + 2 * 10 * (1 + 2 + 3)


def test_a_block_head_on_shared_keys_runs_once_and_writes_none():
    shared = OWN | {"own_kv": False}
    price = Costs(SHAPE, [shared]).price(one_row([1, 0], [4, 5], scores=[NAN, 0.9], headed=[0, 1]))
    assert price.flops[0, 1] == 2 * (100 + 8 * 5) + 2 * 50 + 2 * 5 + 2 * 400 + 2 * (200 + 10 * 3)
    assert price.bytes[0, 1] == 4 * (100 + 6 * 5 + 6 + 50 + 4 + 5 + 400 + 200 + 4 * 3)
    assert price.breakdown["catch_up"] == 0


def test_a_head_that_was_only_read_by_its_gate_is_overhead():
    baseline = PLAIN | {"gate": 0, "reads_logits": True}
    price = Costs(SHAPE, [baseline]).price(one_row([1, 1], [4, 5], scores=[0.1, 0.1], headed=[1, 1]))
    assert price.flops.sum() - price.full_flops.sum() == 2 * 2 * 87
    assert price.saved["depth"] == price.saved["shortlist"] == 0


def test_prefill_by_hand():
    assert Costs(SHAPE, []).prefill_flops(5) == 2 * 5 * (100 + 200) + 2 * 8 * 15 + 2 * 10 * (1 + 2 + 3 + 3 + 3)


def test_the_figure_per_exit_is_the_price_of_such_a_token():
    costs = Costs(SHAPE, [PLAIN, PLAIN | {"depth": 2, "head": 3}])
    kept = {0: ([0.9, NAN], [1, 0]), 1: ([0.1, 0.9], [0, 1]), 2: ([0.1, 0.1], [0, 0])}
    for taken, (scores, headed) in kept.items():
        trace = one_row([2, taken], [6, 7], scores=[NAN, NAN, *scores], headed=[0, 0, *headed], exits=(1, 2))
        assert costs.price(trace).flops[0, 1] == costs.by_exit(7)[taken]
    closed = one_row([2, 1], [6, 7], scores=[NAN, NAN, NAN, 0.9], headed=[0, 0, 0, 1], exits=(1, 2))
    assert costs.price(closed).flops[0, 1] == costs.by_exit(7, [False, True])[1]


def test_the_figure_per_exit_counts_heads_read_by_gates_and_catching_up():
    chain = Costs(SHAPE, []).by_exit(5)[0]
    reading = Costs(SHAPE, [PLAIN | {"reads_logits": True}])
    assert reading.by_exit(5)[1] == chain + 2 * 5 + 2 * 87
    assert reading.by_exit(5, [False])[1] == chain
    own = Costs(SHAPE, [OWN])
    assert own.by_exit(5)[1] == chain + 2 * 5 + 2 * (200 + 10 * 3)
    assert own.by_exit(5, [False])[1] == chain


def test_a_trace_of_another_model_is_refused():
    trace = one_row([1], [4], scores=[NAN], headed=[0])
    with pytest.raises(ValueError, match=r"exits \[1\] of 2 blocks.*for \[2\] of 2"):
        Costs(SHAPE, [PLAIN | {"depth": 2}]).price(trace)
