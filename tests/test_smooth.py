"""Weights scaled for 4 bits: the same functions, and less lost in rounding them."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny
from test_export import KINDS, compare, made, prompt, tokenizer

pytest.importorskip("onnx")

from adaptive import parts, recipes, smooth  # noqa: E402
from adaptive.config import ExitConfig  # noqa: E402
from adaptive.export import export  # noqa: E402
from adaptive.model import EarlyExitModel  # noqa: E402
from adaptive.runtime import Runtime  # noqa: E402
from adaptive.session import Session  # noqa: E402


def uneven(model: EarlyExitModel, by: float = 6) -> EarlyExitModel:
    """Makes some channels of all norms, values and MLPs large, as trained models have them, and biases not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "backbone" in name:
                parameter.normal_(generator=generator)
            elif "norm" in name and "gates" not in name:
                few = torch.rand(parameter.shape, generator=generator) < 0.1
                parameter.add_(few * by)
            elif "v_proj" in name or "up_proj" in name:
                few = torch.rand(len(parameter), 1, generator=generator) < 0.1
                parameter.mul_(1 + few * by)
    return model


def logits(folder, ids: list[int]) -> np.ndarray:
    """The full depth's logits of some tokens."""
    runtime = Runtime.load(folder, threads=1)
    return runtime.logits(Session(runtime, len(ids)).prefill(ids))


@pytest.mark.parametrize("family", recipes.FAMILIES)
def test_scaled_weights_are_the_same_function(family, tmp_path, monkeypatch):
    biases = {"llama": dict(attention_bias=True, mlp_bias=True)}.get(family, {})
    model, ids = uneven(made(family.removesuffix("_text"), **biases)), prompt(length=40)
    plain = logits(export(model, tmp_path / "plain", "fp32", tokenizer()), ids)
    monkeypatch.setattr(parts, "BITS", 32)  # scaled as for 4 bits, and then not rounded
    scaled = export(model, tmp_path / "scaled", "fp32", tokenizer())
    assert np.abs(logits(scaled, ids) - plain).max() < 1e-4 * np.abs(plain).max()
    found = parts.Writer(model, tmp_path, 32)
    list(found.blocks(0, 4))
    spread = [[part.max() / part.min() for part in scales] for scales in found.smooth.found.values()]
    assert (np.median(spread, 0) > 1.5).all(), "some product was not scaled"


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_exits_leave_where_torch_leaves(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "WHOLE", 0)
    monkeypatch.setattr(parts, "BITS", 32)
    model = uneven(made(kind=kind), by=1)
    runtime = Runtime.load(export(model, tmp_path / "out", "fp32", tokenizer()), threads=1)
    scores = [token.step.scores for token in runtime.generate(prompt(), 24, policy=[1e9, 1e9])]
    middle = np.nanmedian(np.array(scores), axis=0).tolist()
    depths = [compare(model, runtime, policy, seed) for seed, policy in enumerate(([0, 0], middle, [math.inf] * 2))]
    assert depths[0] == 2 and depths[2] == 4


def test_4_bits_lose_less_and_the_model_stays(tmp_path, monkeypatch):
    model, ids = uneven(made(kind="mixed")), prompt(length=60)
    with torch.no_grad():  # blocks that add little: after a few of these, untrained, one error is as good as another
        for block in model.view.blocks:
            block.self_attn.o_proj.weight.mul_(0.001)
            block.mlp.down_proj.weight.mul_(0.001)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = logits(export(model, tmp_path / "fp32", "fp32", tokenizer()), ids)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "BITS", 0)
        rough = logits(export(model, tmp_path / "rough", "int4", tokenizer()), ids)
    ours = export(model, tmp_path / "ours", "int4", tokenizer())
    assert np.square(logits(ours, ids) - exact).mean() < 0.9 * np.square(rough - exact).mean()
    again = export(model, tmp_path / "again", "int4", tokenizer())
    assert np.array_equal(logits(ours, ids), logits(again, ids))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(block.self_attn.o_proj._forward_pre_hooks for block in model.view.blocks)


def test_other_precisions_are_left_alone(tmp_path, monkeypatch):
    asked, written = [], smooth.written
    monkeypatch.setattr(smooth, "written", lambda view: asked.append(view) or written(view))
    model = EarlyExitModel.from_backbone(tiny(head_dim=16, hidden_size=64), ExitConfig(depths=[2]))
    for precision, times in (("fp32", 0), ("int8", 0), ("int4", 1)):
        export(model, tmp_path / precision, precision, tokenizer())
        assert len(asked) == times, precision


def test_scales_are_found_where_inputs_are_uneven():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 64, generator=generator).numpy(), torch.randn(200, 64, generator=generator)
    x[:, 5] *= 30
    scales = smooth.best(weight, x)
    assert scales.argmax() == 5 and scales.shape == (64,) and scales.max() * scales.min() == pytest.approx(1, abs=1e-5)
