"""Metrics load without a hub, agree with the library's own figures, and add up over batches."""

import math

import evaluate
import numpy as np
import pytest
import torch
from conftest import tiny

from adaptive import EarlyExitModel, ExitConfig, losses, metrics


def test_they_are_the_trace_s_and_the_losses_figures():
    model = EarlyExitModel.from_backbone(tiny("llama"), ExitConfig(depths=[1, 3]))
    for gate in model.exits.gates:
        torch.nn.init.normal_(gate.read.weight, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(0))
    settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    trace = model.generate(ids, **settings, return_dict_in_generate=True, policy=[0.5, 0.5]).trace
    price = model.costs.price(trace)
    depth = metrics.load("expected_depth").compute(predictions=trace.depth[trace.valid], layers=trace.layers)
    assert depth == {"expected_depth": trace.mean_depth, "depth_share": trace.mean_depth / 4}
    metric = metrics.load("relative_flops")
    for row in range(3):
        metric.add_batch(predictions=price.flops[row], references=price.full_flops[row])
    assert metric.compute()["relative_flops"] == pytest.approx(price.relative_flops) and price.relative_flops < 1
    probed = model.generate(ids, **settings, return_dict_in_generate=True, probe=True).trace
    scores, harmless = probed.scores[..., 0].flatten(), (probed.regret[..., 0] <= 0.25).flatten()
    found = metrics.load("gate_calibration_error").compute(predictions=scores, references=harmless.astype(int))
    expected = losses.calibration_error(torch.tensor(scores), torch.tensor(harmless))
    assert found["gate_calibration_error"] == pytest.approx(float(expected), abs=1e-6) and float(expected) > 0


def test_agreement_and_regret_by_hand_and_combined():
    together = evaluate.combine([metrics.load("exit_agreement")])
    assert together.compute(predictions=[1, 2, 3, 4], references=[1, 2, 5, 4]) == {"exit_agreement": 0.75}
    logs = np.log([[0.5, 0.5], [0.1, 0.6], [0.3, 0.35]])
    found = metrics.load("regret").compute(predictions=logs[:, 0], references=logs[:, 1])
    assert found["harm"] == pytest.approx(1 / 3)
    assert found["regret"] == pytest.approx((math.log(6) + math.log(0.35 / 0.3)) / 3)
    assert metrics.load("regret").compute(predictions=logs[:, 0], references=logs[:, 1], tolerance=2)["harm"] == 0
    with pytest.raises(ValueError, match="no metric `rouge`; there are exit_agreement"):
        metrics.load("rouge")
