"""On a GPU what holds on a CPU, in float32 and bfloat16. Skipped where there is none."""

import math

import pytest
import torch
from conftest import VOCAB, prompts, tiny

from adaptive import replay
from adaptive.certify import calibrate
from adaptive.config import ExitConfig, LossConfig
from adaptive.model import EarlyExitModel
from adaptive.objective import full_states
from adaptive.policy import ExitPolicy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE, NEW = "cuda", 12
SOME = ["llama", "qwen3", "gemma3", "phi3", "gpt2"]
NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.06}  # of logits, as a share of the largest, by order of summation


def with_exits(family: str, dtype=torch.float32, device: str = DEVICE, **config) -> EarlyExitModel:
    """A tiny model whose gates and adapters are random, so that tokens leave at every depth."""
    model = EarlyExitModel.from_backbone(tiny(family), ExitConfig(depths=[1, 3], **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.exits.named_parameters():
            if parameter.dim() >= 2 and ("gates" in name or "up" in name or "down" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.backbone.to(dtype)
    model.exits.heads.to(dtype)
    return model.to(device)


def asked(batch: int, device: str = DEVICE) -> dict:
    return {name: tensor.to(device) for name, tensor in prompts(batch).items()}


def generate(model, inputs, **kwargs):
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, **settings | kwargs)


class Turns(ExitPolicy):
    """Lets tokens out at the first exit, at the second, at none, and so on."""

    def leaves(self, exit, scores, progress):
        return progress.tokens % 3 == exit


def same_but_for_ties(model, inputs, got, wanted) -> bool:
    """Whether rows are equal up to the first token that the full model likes as well as the one in its place."""
    start = inputs["input_ids"].shape[1]
    for row, (one, other) in enumerate(zip(got.tolist(), wanted.tolist(), strict=True)):
        if one == other:
            continue
        place = next(i for i in range(len(one)) if one[i] != other[i])
        keep = inputs["attention_mask"][row].bool()
        prefix = torch.cat([inputs["input_ids"][row, keep], wanted[row, start:place]])[None]
        logits = model.backbone(input_ids=prefix).logits[0, -1].float()
        if abs(float(logits[one[place]] - logits[other[place]])) > NOISE[model.dtype] * float(logits.abs().max()):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", SOME)
def test_greedy_is_that_of_transformers(family, batch, dtype, monkeypatch):
    monkeypatch.setattr("adaptive.drafting.Drafting._best", lambda self: 4)  # drafting goes on though it does not pay
    model, inputs = with_exits(family, dtype), asked(batch)
    expected = model.backbone.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    full = generate(model, inputs, policy=[math.inf, 2.0])
    drafted = generate(model, inputs, policy=Turns((0.0, 0.0)), kv="verify")
    assert (full.trace.depth == 4).all() and drafted.trace.drafted.any()
    if dtype == torch.float32:
        assert torch.equal(full.sequences, expected) and torch.equal(drafted.sequences, expected)
    else:
        assert same_but_for_ties(model, inputs, full.sequences, expected)
        assert same_but_for_ties(model, inputs, drafted.sequences, expected)


@pytest.mark.parametrize("config", [{}, {"shortlist": 32}, {"shortlist": 32, "screen": 8}], ids=str)
@pytest.mark.parametrize("policy", [Turns((0.0, 0.0)), ExitPolicy((0.5, 0.5)), ExitPolicy((0.0, 2.0))], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_graphs_give_what_single_kernels_give(family, policy, config, monkeypatch):
    model, inputs = with_exits(family, head="norm", gate="mlp", **config), asked(3)
    settings = {"policy": policy, "max_new_tokens": 30, "output_logits": True}
    monkeypatch.setattr(replay, "SMALLEST", 16)
    there = [generate(model, inputs, **settings, cache_implementation="static") for _ in range(2)][-1]
    assert [each.capacity for each in replay._kept[model.exits]][-1] == 64, "they grew, and were used again"
    here = generate(model, inputs, **settings)
    assert torch.equal(there.sequences, here.sequences) and (there.trace.taken == here.trace.taken).all()
    for one, other in zip(there.logits, here.logits, strict=True):
        listed = other.isfinite()
        assert torch.equal(listed, one.isfinite())
        assert (one - other)[listed].abs().max() <= NOISE[torch.float32] * other[listed].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SOME)
def test_recomputed_logits_are_those_of_a_teacher_forced_pass(family, dtype):
    model, inputs = with_exits(family, dtype), asked(1)
    out = generate(model, inputs, policy=Turns((0.0, 0.0)), kv="recompute", output_logits=True)
    mask, start = torch.ones_like(out.sequences), inputs["input_ids"].shape[1]
    states, final, calls = full_states(model.view, out.sequences, mask, model.depths)
    normed = [*(head(state) for head, state in zip(model.exits.heads, states, strict=True)), final]
    taken = out.trace.taken[0].tolist()
    assert set(taken) == {0, 1, 2}
    for step, index in enumerate(taken):
        wanted = model.view.logits(normed[index][0, start - 1 + step]).float()
        assert (out.logits[step][0] - wanted).abs().max() <= NOISE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
@pytest.mark.parametrize("family", SOME)
def test_a_row_alone_and_a_row_on_a_cpu(family, kv, sampled):
    model, inputs = with_exits(family), asked(3)
    settings = {"policy": Turns((0.0, 0.0)), "kv": kv, "do_sample": sampled}
    out = generate(model, inputs, seed=[5, 6, 7], **settings)
    start = inputs["input_ids"].shape[1]
    for row in range(3):
        keep = inputs["attention_mask"][row].bool()
        alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, keep]}, seed=[5 + row], **settings)
        assert torch.equal(alone.sequences[0, -NEW:], out.sequences[row, start:])
    there = generate(with_exits(family, device="cpu"), asked(3, "cpu"), seed=[5, 6, 7], **settings)
    assert torch.equal(there.sequences, out.sequences.cpu()), "the same seeds draw the same tokens"


@pytest.mark.parametrize("head", ["linear_mlp", "block"])
def test_loss_and_gradients_are_those_of_a_cpu(head):
    found = {}
    for device in ("cpu", DEVICE):
        model = with_exits("llama", device=device, head=head, gate="mlp").train()
        ids = asked(4, device)["input_ids"]
        model.loss_config = LossConfig(negatives=None)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms = [float(p.grad.norm()) for p in model.exit_parameters() if p.grad is not None]
        found[device] = torch.tensor([float(loss), *norms])
    assert torch.allclose(found["cpu"], found[DEVICE], rtol=1e-3, atol=1e-5)


def test_a_screened_model_is_calibrated_saved_and_used_on_a_cpu(tmp_path):
    backbone = tiny("llama").to(DEVICE)
    model = EarlyExitModel.from_backbone(
        backbone, ExitConfig(depths=[1, 3, 4], head="norm", shortlist=32, screen=8, gate="mlp")
    )
    ids = torch.randint(3, VOCAB, (60, 7), generator=torch.Generator().manual_seed(0)).tolist()
    certificate = calibrate(model, ids, risk=0.9, max_new_tokens=4)
    assert certificate.n == 45
    model.save_pretrained(tmp_path)
    again = EarlyExitModel.from_pretrained(tmp_path)
    assert again.device.type == "cpu" and again.policy == model.policy
    there, here = (generate(each, asked(2, each.device.type)).sequences.cpu() for each in (model, again))
    assert torch.equal(there, here)
