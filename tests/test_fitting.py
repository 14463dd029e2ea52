"""Heads and gates: what is fitted before the first step and after the last, and that every head takes steps."""

import pytest
import torch
from conftest import FAMILIES, VOCAB, tiny
from test_model import batch
from test_parity import with_exits

from adaptive import EarlyExitModel, ExitConfig, losses
from adaptive.closed_form import fit_exits, fit_linear
from adaptive.gates import collect, figures, fit_gates
from adaptive.objective import full_states
from adaptive.states import with_states


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_linear_head_starts_at_the_least_squares_map(family):
    """Where the last blocks are linear it says what they say; a lower rank is worse, and any is better than none."""
    model = with_exits(family, depths=(2,), head="linear", rank=32)
    head, norm = model.exits.heads[0], model.view.norm
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator)
    true = torch.eye(32) + 0.2 * torch.randn(32, 32, generator=generator)
    with torch.no_grad():
        for parameter in norm.parameters():  # gains from a seventh to seven, some of them negative
            parameter.copy_(torch.randn(parameter.shape, generator=generator).exp())
            parameter[::3] *= -1
        y = norm(x @ true.T)
        head.norm.load_state_dict(norm.state_dict())
        before = (head(x) - y).square().mean()
        fit_linear(head, norm, x, y)
        assert (head(x) - y).square().mean() < 0.05 * before
        low = with_exits(family, depths=(2,), head="linear", rank=4).exits.heads[0]
        low.norm.load_state_dict(norm.state_dict())
        fit_linear(low, norm, x, y)
        assert (head(x) - y).square().mean() < (low(x) - y).square().mean() < before
        wide = with_exits(family, depths=(2,), head="linear", rank=40).exits.heads[0]  # wider than the state
        wide.norm.load_state_dict(norm.state_dict())
        fit_linear(wide, norm, x, y)
        assert torch.allclose(wide(x), head(x), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_mlps_behind_an_adapter_add_nothing_at_first_and_learn(family):
    state, generator = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), torch.Generator()
    plain, both = (
        EarlyExitModel.from_backbone(tiny(family), ExitConfig(depths=[2], head=head)).exits.heads[0]
        for head in ("linear", "linear_mlp")
    )
    with torch.no_grad():
        plain.up.weight.normal_(generator=generator.manual_seed(2))
    both.load_state_dict(plain.state_dict(), strict=False)
    assert len(both.mlps) == 1 and torch.equal(both(state), plain(state))
    both(state)[:, 0].sum().backward()
    assert both.mlps[0].down.weight.grad.abs().max() > 0
    with torch.no_grad():
        both.mlps[0].down.weight.normal_(generator=generator)
    assert not torch.allclose(both(state), plain(state), atol=1e-3)


@pytest.mark.parametrize("head", ["linear", "linear_mlp"])
def test_linear_heads_start_alike_with_and_without_kept_states(tmp_path, head):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (12, 16), generator=generator)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    rows["labels"][:, :5] = -100
    found = []
    for keep in (False, True):
        model = with_exits("llama", depths=(1, 3), head=head, rank=8)
        fit_exits(model, with_states(model, rows, tmp_path) if keep else rows)
        found.append(torch.cat([head(torch.ones(1, 32)).flatten() for head in model.exits.heads]))
        assert not torch.equal(model.exits.heads[0].up.weight, torch.zeros(32, 8))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "block"])
def test_examples_for_gates_are_what_evaluation_counts(llama, head):
    model, inputs = EarlyExitModel(llama, ExitConfig(depths=[1, 3], head=head)).eval(), batch()
    states, no_harm = model(**inputs, examples=True).examples
    labelled = int((inputs["labels"][:, 1:] != -100).sum())
    assert states.shape == (labelled, 2, 32) and no_harm.shape == (labelled, 2) and no_harm.dtype == torch.bool
    counted = model(**inputs).metrics
    for index, depth in enumerate((1, 3)):
        assert float(no_harm[:, index].float().mean()) == pytest.approx(float(counted[f"exit_{depth}/no_harm"]))
    expected = full_states(model.view, inputs["input_ids"], inputs.get("attention_mask"), (1, 3))[0]
    keep = inputs["labels"][:, 1:] != -100
    assert torch.equal(states[:, 1], expected[1][:, :-1][keep])


def test_fitted_gates_tell_what_can_be_told(llama):
    """Harm that a direction of the state decides is found, each exit's by its own gate; where nothing tells, nothing is
    found; a baseline is left alone; the same seed, the same gate."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(24000, 3, 32, generator=generator)
    no_harm = torch.stack(
        [states[:, 0, 3] > 1, states[:, 1, 7] < 0.5, torch.rand(24000, generator=generator) > 0.5], 1
    )
    found = []
    for _ in range(2):
        gates = EarlyExitModel(llama, ExitConfig(depths=[1, 2, 3], gate="mlp")).exits.gates
        torch.manual_seed(1)
        for parameter in (p for gate in gates for p in gate.read.parameters()):
            parameter.data.normal_(std=0.1)
        fit_gates(gates, states, no_harm, seed=5)
        found.append(torch.cat([p.flatten() for p in gates.parameters()]).detach())
    assert torch.equal(*found)
    fresh = torch.randn(12000, 3, 32, generator=generator)
    true = torch.stack([fresh[:, 0, 3] > 1, fresh[:, 1, 7] < 0.5, fresh[:, 2, 3] > 1], 1)
    told = figures(gates, fresh, true, (1, 2, 3))
    assert min(told["exit_1/auc"], told["exit_2/auc"]) > 0.95 and abs(told["exit_3/auc"] - 0.5) < 0.1
    assert max(told["exit_1/ece"], told["exit_2/ece"]) < 0.08
    assert told["exit_1/no_harm"] == pytest.approx(0.16, abs=0.03)
    baseline = EarlyExitModel(llama, ExitConfig(depths=[1, 2, 3], gate="max_prob")).exits.gates
    fit_gates(baseline, states, no_harm, seed=5)
    assert set(figures(baseline, states, no_harm, (1, 2, 3))) == {f"exit_{depth}/no_harm" for depth in (1, 2, 3)}


def test_many_examples_make_larger_batches_and_no_more_steps(llama, monkeypatch):
    gates = EarlyExitModel(llama, ExitConfig(depths=[1])).exits.gates
    states, seen = torch.randn(4000, 1, 32, generator=torch.Generator().manual_seed(0)), []
    loss = losses.gate_loss
    monkeypatch.setattr(losses, "gate_loss", lambda *args: seen.append(len(args[0])) or loss(*args))
    for most, expected in ((4096, [256] * 46), (10, [1200] * 10)):
        monkeypatch.setattr("adaptive.gates.STEPS", most)
        fit_gates(gates, states, states[..., 0] > 0, seed=0)
        assert seen == expected, "three passes, either way"
        seen.clear()


def test_gates_are_fitted_to_no_more_rows_than_they_need(llama):
    model = EarlyExitModel(llama, ExitConfig(depths=[1, 3]))
    ids = torch.randint(3, VOCAB, (20, 9), generator=torch.Generator().manual_seed(0))
    some = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    settings = {"device": model.device, "seed": 0, "batch_size": 4}
    everything, part = (collect(model, some, max_tokens=most, **settings) for most in (1000, 60))
    assert len(everything[0]) == 160 and len(part[0]) == 64
    assert torch.equal(part[0], everything[0][:64]) and torch.equal(part[1], everything[1][:64])
    nothing = collect(model, some | {"labels": torch.full_like(ids, -100)}, max_tokens=60, **settings)
    before = [p.clone() for p in model.exits.gates.parameters()]
    fit_gates(model.exits.gates, *nothing, seed=0)
    assert nothing[0].shape == (0, 2, 32) and all(map(torch.equal, before, model.exits.gates.parameters()))
    assert figures(model.exits.gates, *nothing, model.depths)["exit_1/auc"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_every_head(family):
    for head in ("linear", "mlp", "linear_mlp", "block"):
        model = EarlyExitModel(tiny(family), ExitConfig(depths=[2], head=head)).train()
        out = model(**batch(), attention_mask=torch.ones(2, 10, dtype=torch.long))
        out.loss.backward()
        assert all(p.grad is not None for p in model.exit_parameters())
