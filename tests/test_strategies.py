"""The exact ways to treat skipped blocks: tokens that wait, and drafts that the full model judges."""

import math
import os
import resource

import numpy as np
import pytest
import torch
from conftest import prompts, tiny
from test_parity import generate, with_exits

from adaptive.config import ExitConfig
from adaptive.kv import TrainingKV
from adaptive.model import EarlyExitModel
from adaptive.objective import exit_features, full_states
from adaptive.policy import ExitPolicy

FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt"]
HEADS = [("linear", "own"), ("block", "own"), ("block", "shared")]
families = pytest.mark.parametrize("family", FAMILIES)


def agreeing(family, seed=0, **config):
    """A model whose last blocks change little, so that its exits are often right; and thresholds for a mix of exits."""
    backbone = tiny(family, seed)
    blocks = EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[1])).view.blocks
    with torch.no_grad():
        for block, scale in zip(blocks[1:], (0.6, 0.6, 0.3)):
            for parameter in block.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(scale)
    model = EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[1, 3], **config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.gate_parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model, middle(model, prompts(4))


def middle(model, inputs, share=0.5):
    """Thresholds that this share of the tokens reach."""
    scores = generate(model, inputs, probe=True).trace.scores
    return [float(np.quantile(scores[..., index], 1 - share)) for index in range(scores.shape[-1])]


class Turns(ExitPolicy):
    """Every row takes the exits, and the full depth, in turn, two tokens at a time."""

    def leaves(self, exit, scores, progress):
        return progress.tokens // 2 % 3 == exit


@pytest.fixture
def generous(monkeypatch):
    """Drafting goes on though it does not pay."""
    monkeypatch.setattr("adaptive.drafting.Drafting._best", lambda self: 4)


@families
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("head,kv", HEADS)
def test_verified_greedy_is_transformers_greedy(family, batch, head, kv, generous):
    model, thresholds = agreeing(family, head=head, head_kv=kv)
    inputs = prompts(batch)
    expected = model.backbone.generate(**inputs, max_new_tokens=20, do_sample=False)
    out = generate(model, inputs, kv="verify", policy=thresholds, max_new_tokens=20)
    assert torch.equal(out.sequences, expected)
    trace = out.trace
    assert trace.taken.shape == (batch, 20) and (trace.valid).all()
    assert trace.accepted[trace.drafted].any() and not trace.accepted[trace.drafted].all()
    assert (trace.context == trace.prompt[:, None] + np.arange(20)).all()
    assert ((trace.taken == 2) | trace.drafted).all() and trace.rejected.valid.any()


@families
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("head,kv", HEADS)
def test_recomputed_logits_are_those_of_a_teacher_forced_pass(family, batch, head, kv):
    model, _ = agreeing(family, head=head, head_kv=kv)
    inputs, view = prompts(batch), model.view
    out = generate(model, inputs, kv="recompute", policy=Turns((0.5, 0.5)), output_logits=True, max_new_tokens=20)
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, 20, dtype=torch.long)], dim=1)
    cache = TrainingKV(4)
    with torch.no_grad():
        states, normed, calls = full_states(view, out.sequences, mask, (1, 3), cache)
        heads = [exit_features(view, model.exits, e, (1, 3)[e], states[e], calls, cache) for e in (0, 1)]
        expected = torch.stack([view.logits(normed) for normed in (*heads, normed)])
    expected = expected[:, :, inputs["input_ids"].shape[1] - 1 : -1]
    taken = torch.tensor(out.trace.taken).long()
    wanted = expected.gather(0, taken[None, :, :, None].expand(1, -1, -1, expected.shape[-1]))[0]
    assert torch.allclose(torch.stack(out.logits, dim=1), wanted, atol=1e-4)
    assert (np.diff(out.trace.behind.max(axis=2)) != 0).any() and len(np.unique(taken)) == 3
    waiting = out.trace.behind[..., 1].sum(axis=1)
    assert (waiting <= (taken < 2).sum(1).numpy()).all() and waiting.any(), "each runs once"


@families
@pytest.mark.parametrize("kv", ["recompute", "verify"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_alone_is_the_row_in_a_batch(family, kv, sampled, generous):
    model, thresholds = agreeing(family, head=["linear", "block"])
    inputs = prompts(4)
    settings = dict(kv=kv, policy=thresholds, max_new_tokens=20, do_sample=sampled, eos_token_id=[5, 6, 7])
    settings |= dict(temperature=1.3, repetition_penalty=1.2) if sampled else {}
    out = generate(model, inputs, seed=3, **settings)
    for row in range(4):
        keep = inputs["attention_mask"][row].bool()
        alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, keep]}, seed=3 + row, **settings)
        length = int(out.trace.valid[row].sum())
        assert torch.equal(alone.sequences[0, keep.sum() :], out.sequences[row, 9 : 9 + length])
        # Who waits is up to the batch under "recompute": whoever left runs along where another row goes on.
        names = ("taken", "headed", "context", "caught_up") + ("behind",) * (kv == "verify")
        for name in names:
            ours, theirs = getattr(out.trace, name)[row, :length], getattr(alone.trace, name)[0]
            if name == "caught_up":  # the first time a block head is asked it runs over the row's padding, too
                ours, theirs = ours[..., 0], theirs[..., 0]
            assert (ours == theirs).all(), name
    assert kv == "recompute" or out.trace.rejected.valid.any()


def joint(model, ids, steps, warp):
    """Probabilities [vocabulary ** steps] of what the full model samples behind a prompt [1, tokens]."""
    out, prefixes = torch.ones(1, dtype=torch.float64), ids
    for _ in range(steps):
        with torch.no_grad():
            probabilities = warp(model.backbone(prefixes).logits[:, -1]).softmax(-1)
        vocab = probabilities.shape[-1]
        out = (out[:, None] * probabilities.double()).flatten()
        following = torch.arange(vocab).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(vocab, 0), following], dim=1)
    return out


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 4}])
def test_verified_sampling_follows_the_full_model(settings, generous):
    """Chi-square of three tokens in a row over 3,000 rows; drafts are often wrong here, and the first is no draft."""
    rows, steps, vocab = 3000, 4, 5
    backbone = tiny("llama", vocab_size=vocab, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[1, 3], head="norm"))
    ids = torch.tensor([[1, 3, 2]])
    out = generate(model, {"input_ids": ids.expand(rows, -1)}, kv="verify", policy=[0.5, 0.0], seed=11, do_sample=True,
                   max_new_tokens=steps, **{"top_k": 0, **settings})  # fmt: skip
    assert 0.05 < out.trace.acceptance < 0.95 and out.trace.drafted.mean() > 0.3
    top = settings.get("top_k", vocab)

    def warp(logits):
        logits = logits / settings.get("temperature", 1.0)
        return logits.masked_fill(logits < logits.topk(top).values[:, -1:], -math.inf)

    expected = joint(model, ids, steps, warp) * rows
    codes = (out.sequences[:, -steps:] * vocab ** torch.arange(steps - 1, -1, -1)).sum(1)
    counts = torch.bincount(codes, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    pooled = torch.cat([expected[often], expected[~often].sum()[None]])
    found = torch.cat([counts[often], counts[~often].sum()[None]])
    chi_square = float(((found - pooled) ** 2 / pooled.clamp_min(1e-9)).sum())
    freedom = len(pooled) - 1
    # Wilson and Hilferty: chi-square to the third is near normal; 3.1 standard deviations, p = 0.001.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.1 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit, (chi_square, limit, freedom)


def test_an_eager_stop_streamer_and_scores_come_out_as_at_full_depth(generous):
    class Keep:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, thresholds = agreeing("llama")
    inputs = prompts(3)
    free = generate(model, inputs, max_new_tokens=20).sequences
    settings = dict(eos_token_id=[int(free[0, -7]), int(free[1, -12])], repetition_penalty=1.3, max_new_tokens=20)
    settings |= dict(output_scores=True, output_logits=True)
    expected = model.backbone.generate(**inputs, do_sample=False, return_dict_in_generate=True, **settings)
    streamer = Keep()
    out = generate(model, inputs, kv="verify", policy=thresholds, streamer=streamer, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    valid = torch.tensor(out.trace.valid)
    for ours, theirs in ((out.scores, expected.scores), (out.logits, expected.logits)):
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.allclose(a[valid[:, step]], b[valid[:, step]], atol=1e-4)
    assert streamer.ended and [torch.tensor(c).tolist() for c in streamer.got[1:]] == out.sequences[:, 9:].T.tolist()


def test_drafting_gives_up_where_it_does_not_pay():
    """Exits that are always wrong cost a few drafts per row, and no more."""
    model = with_exits("llama", depths=(1, 3))
    out = generate(model, prompts(3), kv="verify", policy=[0.0, math.inf], max_new_tokens=60)
    expected = model.backbone.generate(**prompts(3), max_new_tokens=60, do_sample=False)
    assert torch.equal(out.sequences, expected)
    assert out.trace.drafted[:, -30:].sum() == 0
    assert model.costs.price(out.trace).relative_bytes < 1.1


@pytest.fixture
def two_threads(monkeypatch):
    """On some CPUs layers are turned for few states, from two threads on; real ones take minutes on busy cores."""
    monkeypatch.setattr("adaptive.turned.torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("adaptive.turned.torch.get_num_threads", lambda: 2)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
def test_turned_layers_say_the_same(family, kv, generous, two_threads, monkeypatch):
    model, thresholds = agreeing(family, head=["linear", "block"])
    settings = dict(kv=kv, policy=thresholds, max_new_tokens=20)
    calls, mm, bmm = [], torch.mm, torch.bmm
    monkeypatch.setattr("adaptive.turned.torch.mm", lambda a, b: calls.append(b.shape[1]) or mm(a, b))
    monkeypatch.setattr("adaptive.turned.torch.bmm", lambda a, b: calls.append(b.shape[2]) or bmm(a, b))
    out = generate(model, prompts(3), **settings)
    assert set(calls) >= {1, 2, 3} and max(calls) <= 8
    monkeypatch.setattr("adaptive.turned.MOST", 0)
    plain = generate(model, prompts(3), **settings)
    assert torch.equal(out.sequences, plain.sequences) and (out.trace.taken == plain.trace.taken).all()
    expected = model.backbone.generate(**prompts(3), max_new_tokens=20, do_sample=False)
    assert kv != "verify" or torch.equal(out.sequences, expected)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="kv='copy' is not one of propagate, recompute, verify"):
        generate(with_exits("llama"), prompts(1), kv="copy")


def test_random_requests_in_batches_are_those_alone(generous):
    """Lengths, sampling, early stops, thresholds and strategies at random; every row equals its solo run."""
    # REQUESTS=1000 LONGEST=2000 is the long version (or pieces of it, by SEED); then memory must not grow either.
    requests, most = int(os.environ.get("REQUESTS", 12)), int(os.environ.get("LONGEST", 40))
    model, _ = agreeing("llama", head=["linear", "block"])
    rng = np.random.default_rng(int(os.environ.get("SEED", 5)))
    model.config.max_position_embeddings = max(128, 2 * most)
    for request in range(requests):
        if request == requests // 2:
            resource_half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        batch, longest = int(rng.integers(1, 9)), int(most ** rng.uniform(0, 1))
        if request < 3:  # the largest come first, one for each strategy: after them no peak is due to a larger one
            batch, longest = 8, most
        lengths = rng.integers(1, longest + 1, batch)
        lengths[0] = longest
        ids = torch.tensor(rng.integers(3, 97, (batch, longest)))
        mask = torch.tensor(np.arange(longest) >= longest - lengths[:, None]).long()
        settings = dict(kv=["propagate", "recompute", "verify"][request % 3], policy=rng.uniform(0.2, 0.9, 2).tolist())
        settings |= dict(max_new_tokens=int(rng.integers(1, 40)), eos_token_id=rng.integers(3, 97, 3).tolist())
        settings["do_sample"] = sampled = bool(rng.integers(2))
        if sampled:
            settings |= dict(temperature=float(rng.uniform(0.5, 2)), top_k=int(rng.integers(0, 30)))
        out = generate(model, {"input_ids": ids, "attention_mask": mask}, seed=request, **settings)
        for row in range(batch):
            alone = generate(model, {"input_ids": ids[row : row + 1, mask[row].bool()]}, seed=request + row, **settings)
            length = int(out.trace.valid[row].sum())
            assert torch.equal(alone.sequences[0, lengths[row] :], out.sequences[row, longest : longest + length])
            assert (alone.trace.taken[0] == out.trace.taken[row, :length]).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.1 * resource_half


def test_a_probe_asks_about_the_first_token_under_every_strategy():
    model, inputs = with_exits("llama"), prompts(2)
    found = [generate(model, inputs, probe=True, kv=kv).trace for kv in ("propagate", "recompute", "verify")]
    assert all(np.array_equal(trace.regret, found[0].regret) for trace in found)
    assert not np.isnan(found[0].regret).any()
