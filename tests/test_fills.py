"""Fitted K/V of skipped blocks: by least squares, nearer to what the blocks make, and otherwise as if projected."""

import math

import peft
import pytest
import torch
from conftest import VOCAB, prompts, tiny

from adaptive import fills
from adaptive.config import ExitConfig
from adaptive.fills import Moments, fit_fills
from adaptive.kv import KV
from adaptive.model import EarlyExitModel
from adaptive.policy import ExitPolicy

SETTINGS = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)


def rows(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows, every second one padded on the right."""
    ids = torch.randint(3, VOCAB, (count, 16), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[::2, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def made(family: str, **config) -> EarlyExitModel:
    return EarlyExitModel.from_backbone(tiny(family), ExitConfig(depths=[1, 3], **config))


def errors(model: EarlyExitModel, depth: int, fill) -> list[float]:
    """Mean squared error of the K/V of each block beyond a depth, as a share of their variance over other tokens."""
    view, batch = model.view, rows(20, seed=7)
    ids, mask = batch["input_ids"][1::2], batch["attention_mask"][1::2]
    true, other = KV(4, 16, len(ids)), KV(4, 16, len(ids))
    with torch.no_grad():
        hidden, calls = view.start(ids, mask, None, true)
        state = view.run(hidden, calls, 0, depth)
        view.run(state, calls, depth, 4)
        view.fill(state, calls, depth, 4, other, fill)
    out = []
    for block in range(depth, 4):
        found, wanted = (
            torch.cat([c.keys[block], c.values[block]], -1).transpose(1, 2).flatten(2) for c in (other, true)
        )
        out.append(float((found - wanted).square().mean() / (wanted - wanted.mean((0, 1))).square().mean()))
    return out


def test_the_fit_is_that_of_least_squares(monkeypatch):
    monkeypatch.setattr(fills, "TRUST", 0)
    model = made("llama")
    fill, pack = model.exits.fills[0], model.view.projections
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 32, generator=generator) + 1, torch.randn(300, 3 * 2 * 16, generator=generator)
    moments = Moments()
    weight = torch.rand(300, generator=generator)
    for part in range(0, 300, 100):
        moments.add(*(values[part : part + 100] for values in (x, y, weight)))
    fill.fit(moments, pack)
    root = weight.double().sqrt()[:, None]
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], 1) * root, y * root).solution
    assert torch.allclose(fill.weight.flatten(0, 2).T, expected[:-1].float(), atol=1e-4)
    assert torch.allclose(fill.bias.flatten(), expected[-1].float(), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_a_fit_is_nearer_to_what_the_blocks_make_and_starts_as_their_own(family):
    model = made(family)
    for depth, fill in zip(model.depths, model.exits.fills, strict=True):
        own = errors(model, depth, None)
        assert errors(model, depth, fill) == pytest.approx(own, rel=1e-4)
    before = [errors(model, depth, None) for depth in model.depths]
    fit_fills(model, rows(200), 10_000)
    after = [errors(model, depth, fill) for depth, fill in zip(model.depths, model.exits.fills, strict=True)]
    assert sum(after[0]) < 0.7 * sum(before[0]), (before, after)
    assert after[1][0] < 0.01, "the block right behind an exit gets the very state that it expects"


def test_what_a_gate_is_sure_of_is_fitted_to():
    """A map may forget what never leaves: each half of the states is met better by the map that its gate asks for."""
    found = []
    for sign in (1, -1):
        model, batch = made("llama", gate="linear"), rows(200)
        gate = model.exits.gates[0]
        with torch.no_grad():
            gate.read.weight.zero_()[0, 0], gate.read.bias[:] = 40.0 * sign, 0.0
        model.requires_grad_(False)
        fit_fills(model, batch, 10_000)
        states = fills._states(model.view, batch["input_ids"], batch["attention_mask"], batch["labels"], 1)
        pack, sure = model.view.projections, model.exits.gates[0].score(states[1]) > 0.5
        wanted = torch.cat([fills._linear(pack, depth, pack.unit(states[depth])) for depth in (1, 2, 3)], 1)
        weight, bias = model.exits.fills[0].of(1, 4)
        error = (pack.unit(states[1]).detach() @ weight.flatten(0, 2).T + bias.flatten() - wanted).square().mean(1)
        sure = sure if sign == 1 else ~sure  # of the first gate, both times
        found.append([float(error[sure].mean()), float(error[~sure].mean())])
    assert found[0][0] < 0.95 * found[1][0] and found[1][1] < 0.95 * found[0][1], found


def test_decoding_reads_what_the_fit_wrote():
    model, plain = made("llama"), made("llama", fill="projected")
    plain.exits.load_state_dict(model.exits.state_dict(), strict=False)
    inputs = prompts(3)
    policy = [0.0, 0.0]
    expected = plain.generate(**inputs, policy=policy, **SETTINGS)
    before = model.generate(**inputs, policy=policy, **SETTINGS)
    assert torch.equal(before.sequences, expected.sequences)
    policy = [0.5, 2.0]  # some stay, and attend to what those who left have left behind
    before = model.generate(**inputs, policy=policy, **SETTINGS)
    assert {0, 2} <= set(before.trace.taken.flatten().tolist())
    for buffer in model.exits.fills.buffers():
        buffer.add_(0.1)
    after = model.generate(**inputs, policy=policy, **SETTINGS)
    assert torch.equal(after.logits[0], before.logits[0])
    assert not torch.allclose(after.logits[-1], before.logits[-1], atol=1e-3)
    for kv in ("recompute", "verify"):
        exact = [m.generate(**inputs, policy=policy, kv=kv, **SETTINGS).sequences for m in (model, plain)]
        assert torch.equal(*exact), "nothing is skipped for good"


def test_what_is_filled_is_of_the_adapters_in_use():
    """Packed projections are made again when another adapter is chosen, or none, and no other's is merged into them."""
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    backbone = peft.get_peft_model(tiny(), config)
    backbone.add_adapter("b", config)
    model = EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[1, 3], head="norm", fill="projected"))
    assert model.view.packs

    class Turns(ExitPolicy):  # every second token reads what the others have left behind
        def leaves(self, exit, scores, progress):
            return progress.tokens % 2 == 0

    def said(of):
        return torch.stack(of.generate(**prompts(2), policy=Turns((0.0, math.inf)), **SETTINGS).logits)

    first = said(model)
    with backbone.disable_adapter():
        assert torch.allclose(said(model), said(made("llama", head="norm", fill="projected")), atol=1e-5)
    backbone.set_adapter("b")
    other = said(model)
    assert torch.allclose(other, said(EarlyExitModel.from_backbone(backbone, model.exit_config)), atol=1e-5)
    backbone.merge_adapter(["b"])
    assert torch.allclose(other, said(model), atol=1e-4) and not torch.allclose(other, first, atol=1e-2)
    backbone.unmerge_adapter()
    backbone.set_adapter("default")
    assert torch.allclose(first, said(model), atol=1e-4)


def test_where_no_map_is_known_blocks_project_themselves():
    model = made("gpt2")
    assert list(model.exits.fills) == [None, None]
    fit_fills(model, rows(4), 10_000)
    assert model.generate(**prompts(2), policy=[0.0, 0.0], **SETTINGS).sequences.shape == (2, 17)


def test_padding_prompts_and_rows_beyond_the_limit_are_not_fitted_to():
    model, other, batch = made("llama"), made("llama"), rows(24)
    few = int((batch["labels"][:16] != -100).sum())
    fit_fills(model, batch, few)
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)
    # What is not labelled stands behind the rest here, where it changes no state.
    more = {"input_ids": 7, "attention_mask": 1, "labels": -100}
    batch = {name: torch.cat([part[:16], torch.full((16, 3), more[name])], 1) for name, part in batch.items()}
    batch["attention_mask"][:, -3:] = batch["attention_mask"][:, -4:-3]
    fit_fills(other, batch, 10_000)
    assert torch.allclose(model.exits.fills[0].weight, other.exits.fills[0].weight, atol=1e-5)
    before = other.exits.fills[0].weight.clone()
    fit_fills(other, batch | {"labels": torch.full_like(batch["labels"], -100)}, 10_000)
    assert torch.equal(before, other.exits.fills[0].weight), "nothing labelled, nothing to fit to"
