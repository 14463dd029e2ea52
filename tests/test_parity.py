"""Two ways that must agree: our loop and transformers' own, a batch and its rows, an exit and its static sub-model."""

import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES, VOCAB, prompts, tiny
from torch import Tensor

from adaptive.closed_form import fit_exits
from adaptive.config import ExitConfig
from adaptive.exits import best
from adaptive.model import EarlyExitModel
from adaptive.objective import full_states
from adaptive.policy import ExitPolicy

NEW = 12


def with_exits(family, depths=(1, 3), seed=0, **config):
    """A tiny model whose exits have random gates and adapters, so that tokens leave at different depths."""
    model = EarlyExitModel.from_backbone(tiny(family, seed), ExitConfig(depths=list(depths), **config))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.exits.named_parameters():
            if parameter.dim() >= 2 and ("gates" in name or "up" in name or "down" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def generate(model, inputs, **kwargs):
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, **settings | kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_out_of_reach_is_transformers_greedy(family, batch):
    model = with_exits(family)
    inputs = prompts(batch)
    expected = model.backbone.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    out = generate(model, inputs, policy=[math.inf, 2.0])
    assert torch.equal(out.sequences, expected)
    assert (out.trace.depth == 4).all()
    assert len(set(out.sequences[0].tolist())) > 4, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_zero_is_the_static_sub_model(family):
    """The first k blocks, the exit's norm and the LM head, run by transformers on its own."""
    model = with_exits(family, depths=(2,), head="norm")
    sub = tiny(family)
    blocks = EarlyExitModel.from_backbone(sub, ExitConfig(depths=[2])).view
    setattr(blocks.parent, blocks.name, blocks.blocks[:2])
    sub.config.num_hidden_layers = 2
    if getattr(sub.config, "layer_types", None):
        sub.config.layer_types = sub.config.layer_types[:2]
    for batch in (1, 3):
        inputs = prompts(batch)
        expected = sub.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        out = generate(model, inputs, policy=[0.0])
        assert torch.equal(out.sequences, expected)
        assert (out.trace.depth == 2).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head,kv", [("linear", "own"), ("block", "own"), ("block", "shared")])
def test_a_row_alone_is_the_row_in_a_batch(family, head, kv):
    model = with_exits(family, head=head, head_kv=kv)
    inputs = prompts(4)
    probe = generate(model, inputs, probe=True).trace
    # Between two scores: which of them a sum of another order gives is not the question.
    thresholds = [float(np.sort(probe.scores[..., e].flatten())[25:27].mean()) for e in (0, 1)]
    out = generate(model, inputs, policy=thresholds)
    assert len(set(out.trace.taken.flatten().tolist())) == 3, "tokens must leave at every exit"
    for row in range(4):
        keep = inputs["attention_mask"][row].bool()
        alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, keep]}, policy=thresholds)
        assert torch.equal(alone.sequences[0, -NEW:], out.sequences[row, -NEW:])
        assert (alone.trace.taken[0] == out.trace.taken[row]).all()
        assert torch.allclose(
            torch.tensor(alone.trace.scores[0]), torch.tensor(out.trace.scores[row]), atol=1e-4, equal_nan=True
        )


def test_similarity_is_to_the_exit_before_whoever_asked_that(monkeypatch):
    """Neither a neighbour's policy nor a closed exit changes what a gate compares the state with."""
    model = with_exits("llama", depths=(1, 2, 3), gate="similarity")
    probe = generate(model, prompts(1), probe=True).trace.scores[0]
    middle = np.sort(probe, axis=0)[NEW // 2 - 1 : NEW // 2 + 1].mean(0)
    # Under "verify" the text is the full depth's, however many tokens have waited for those that are asked.
    monkeypatch.setattr("adaptive.drafting.Drafting._best", lambda self: 4)
    first = np.median(probe[:, 0])
    for kv, *policy in ("propagate", math.inf, 2, 2), ("propagate", 2, math.inf, 2), ("verify", first, math.inf, 2):
        got = generate(model, prompts(1), policy=policy, kv=kv).trace
        asked = ~np.isnan(got.scores[0])
        assert asked[:, 2].any() and not asked[:, np.isinf(policy)].any()
        assert np.allclose(got.scores[0][asked], probe[asked], atol=1e-5)
    assert got.rejected.behind[..., 0].any() and (got.taken == 0).any()
    mine, other = ExitPolicy((math.inf, math.inf, middle[2])), ExitPolicy((middle[0], 2, 2))
    alone = generate(model, prompts(1), policy=mine)
    both = generate(model, {name: each.repeat(2, 1) for name, each in prompts(1).items()}, policy=[mine, other])
    assert set(alone.trace.taken[0]) == {2, 3} and (both.trace.taken[1] == 0).any()
    assert torch.equal(alone.sequences[0], both.sequences[0])
    assert np.allclose(alone.trace.scores[0], both.trace.scores[0], atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_block_head_decodes_what_it_says_teacher_forced(kv):
    """A block head that runs at every token gives what one pass over the whole text gives."""
    from adaptive.kv import TrainingKV
    from adaptive.objective import exit_features, full_states

    model = with_exits("llama", depths=(2,), head="block", layers=2, head_kv=kv)
    with torch.no_grad():
        for parameter in model.exits.heads.parameters():
            parameter.mul_(1.1)
    inputs = prompts(3)
    out = generate(model, inputs, probe=True, output_logits=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
    cache = TrainingKV(4)
    with torch.no_grad():
        states, normed, calls = full_states(model.view, out.sequences, mask, (2,), cache)
        said = model.view.logits(exit_features(model.view, model.exits, 0, 2, states[0], calls, cache)).argmax(-1)
        full = model.view.logits(normed)
    ends = slice(inputs["input_ids"].shape[1] - 1, -1)
    expected = full[:, ends].amax(-1) - full[:, ends].gather(-1, said[:, ends, None])[..., 0]
    assert torch.allclose(torch.tensor(out.trace.regret[..., 0]), expected, atol=1e-3)
    assert expected.max() > 0.1, "exits that always agree prove nothing"


def test_shortlist_says_only_what_is_on_it_and_can_sit_at_full_depth():
    model = with_exits("llama", depths=(2, 4), shortlist=20)
    ids = torch.arange(40, 60)
    model.exits.choose_shortlists(torch.zeros(VOCAB).index_fill(0, ids, 1.0))
    out = generate(model, prompts(3), policy=[0.0, math.inf])
    assert set(out.sequences[:, -NEW:].flatten().tolist()) <= set(ids.tolist())
    deep = generate(model, prompts(3), policy=[math.inf, 0.0])
    assert (deep.trace.taken == 1).all() and (deep.trace.depth == 4).all()
    assert set(deep.sequences[:, -NEW:].flatten().tolist()) <= set(ids.tolist())


def fitted(model: EarlyExitModel) -> Tensor:
    """Fits the model's screen to states of random rows; returns other such states [N, hidden]."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (24, 16), generator=generator)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    fit_exits(model, {name: values[:20] for name, values in rows.items()})
    return full_states(model.view, ids[20:], None, ())[1].flatten(0, 1).detach()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_screen_that_picks_everything_is_the_full_head(family):
    model = with_exits(family, depths=(2, 4), head="norm", shortlist=VOCAB, screen=3)
    states = fitted(model)
    logits, ids = model.exits.logits(model.view, 1, states)
    expected = model.view.logits(states)
    assert torch.allclose(torch.zeros_like(expected).scatter(1, ids, logits), expected, atol=1e-4)
    inputs = prompts(3)
    out = generate(model, inputs, policy=[math.inf, 0.0])
    expected = model.backbone.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out.sequences, expected) and (out.trace.taken == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_put_into_half_its_bits_generates(dtype):
    for family, config in [("gpt2", {}), ("llama", {"shortlist": 20, "screen": 8})]:
        model = with_exits(family, **config)
        settings = dict(policy=[2.0, 0.0], max_new_tokens=3)
        wanted = generate(model, prompts(2), **settings).trace.scores
        out = generate(model.to(dtype), prompts(2), **settings)
        assert (out.trace.depth == 3).all()
        assert np.allclose(out.trace.scores[:, 0], wanted[:, 0], atol=0.1), "of the prompt"


def test_a_fitted_screen_finds_the_best_entry_more_often_the_higher_its_rank():
    hits = {}
    for rank in (2, 12, 32):
        model = with_exits("llama", depths=(2, 4), shortlist=8, screen=rank)
        states = fitted(model)
        unfitted = with_exits("llama", depths=(2, 4), shortlist=8, screen=rank).exits.screen
        best = model.view.logits(states).argmax(-1)[:, None]
        hits[rank] = [
            float((screen(states, 8) == best).any(1).float().mean()) for screen in (unfitted, model.exits.screen)
        ]
    assert hits[2][1] < hits[12][1] < hits[32][1] == 1 and hits[12][0] < hits[12][1]
    with pytest.raises(ValueError, match="33"):
        with_exits("llama", depths=(2,), shortlist=8, screen=33)


def test_a_screen_picks_the_same_entries_under_autocast():
    model = with_exits("llama", depths=(2, 4), shortlist=8, screen=8)
    states = fitted(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        picked = model.exits.screen(states, 8)
        held = model.exits.screen.holds(states, picked[:, 0], 8)
    assert torch.equal(picked.sort(1)[0], model.exits.screen(states, 8).sort(1)[0]) and held.all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_screened_exit_says_of_many_states_is_what_it_says_of_one(family):
    model = with_exits(family, depths=(2, 4), head="norm", shortlist=6, screen=3)
    states = fitted(model)
    expected = best(*model.exits.logits(model.view, 1, states))
    assert torch.equal(model.exits.said(model.view, 1, states, 16), expected)
    assert 0 < (expected != model.view.logits(states).argmax(-1)).float().mean() < 1, "the screen decides some"


def test_what_a_screened_exit_says_among_candidates_is_the_best_that_the_screen_shows():
    model = with_exits("llama", depths=(2, 4), head="norm", shortlist=30, screen=12)
    states, among = fitted(model), torch.arange(1, VOCAB, 3)
    word = among[model.view.logits(states)[:, among].argmax(-1)]
    shown = (model.exits.screen(states, 30) == word[:, None]).any(1)
    assert 0 < shown.float().mean() < 1
    expected = torch.where(shown, word, best(*model.exits.logits(model.view, 1, states)))
    assert torch.equal(model.exits.said(model.view, 1, states, 16, among), expected)


def test_screened_rows_are_what_they_are_alone():
    model = with_exits("llama", depths=(2, 4), shortlist=10, screen=8)
    fitted(model)
    inputs = prompts(3)
    out = generate(model, inputs, policy=[0.5, 0.5])
    assert len(set(out.trace.taken.flatten().tolist())) > 1
    for row in range(3):
        keep = inputs["attention_mask"][row].bool()
        alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, keep]}, policy=[0.5, 0.5])
        assert torch.equal(alone.sequences[0, -NEW:], out.sequences[row, -NEW:])


def test_sampling_of_a_row_depends_on_its_seed_alone():
    model = with_exits("llama")
    inputs = prompts(3)
    settings = dict(do_sample=True, temperature=0.8, top_k=20, policy=[0.5, 0.5])
    out = generate(model, inputs, seed=7, **settings)
    again = generate(model, inputs, seed=7, **settings)
    assert torch.equal(out.sequences, again.sequences)
    for row in range(3):
        keep = inputs["attention_mask"][row].bool()
        alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, keep]}, seed=7 + row, **settings)
        assert torch.equal(alone.sequences[0, -NEW:], out.sequences[row, -NEW:])
    other = generate(model, inputs, seed=8, **settings)
    assert not torch.equal(out.sequences, other.sequences)


def test_stopping_processors_and_streamer_are_transformers_own():
    class Keep:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    model = with_exits("llama")
    inputs = prompts(1)
    free = generate(model, inputs)
    stop = int(free.sequences[0, -4])
    settings = dict(eos_token_id=stop, repetition_penalty=1.0, min_new_tokens=2)
    expected = model.backbone.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings)
    streamer = Keep()
    out = generate(model, inputs, streamer=streamer, **settings)
    assert torch.equal(out.sequences, expected) and out.sequences.shape[1] < free.sequences.shape[1]
    assert streamer.ended and streamer.got == out.sequences[0].tolist()
    batch = prompts(3)
    expected = model.backbone.generate(**batch, max_new_tokens=NEW, do_sample=False, **settings)
    out = generate(model, batch, **settings)
    assert torch.equal(out.sequences, expected)
    ended = out.trace.taken == -1
    assert ended.any() and (out.sequences[:, -out.trace.taken.shape[1] :][torch.tensor(ended)] == 0).all()


def test_bad_requests_are_refused_in_one_error():
    model = with_exits("llama")
    with pytest.raises(ValueError, match="2 exits"):
        generate(model, prompts(1), policy=[0.5])
    with pytest.raises(ValueError, match="context is 128"):
        generate(model, {"input_ids": torch.ones(1, 130, dtype=torch.long)})
    holed = prompts(1)
    holed["attention_mask"][0, 4] = 0
    with pytest.raises(ValueError, match="0 on the left"):
        generate(model, holed)
    with pytest.raises(ValueError, match="learned positions"):
        with_exits("gpt2").generate(input_ids=torch.ones(1, 120, dtype=torch.long), max_new_tokens=20)
    for settings, said in (
        ({"num_beams": 2}, "beam"),
        ({"seed": [1, 2, 3], "do_sample": True}, "3 seeds for 1 rows"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_model": model.backbone}, "assistant_model"),
        ({"policy": 0.5}, "ExitPolicy"),
        ({"policy": [ExitPolicy((0.5, 0.5)), 0.5]}, "ExitPolicy"),
    ):
        with pytest.raises(ValueError, match=said):
            generate(model, prompts(1), **settings)
    padded = prompts(1)
    padded["attention_mask"][:] = 0
    for inputs in (padded, {"input_ids": torch.ones(0, 3, dtype=torch.long)}):
        with pytest.raises(ValueError, match="at least"):
            generate(model, inputs)
    with pytest.raises(ValueError, match="thresholds"):
        ExitPolicy((-0.1, 0.5))


def test_sampling_follows_the_probabilities():
    """Chi-square over 4,000 rows, each with a generator of its own; entries of probability 0 are never drawn."""
    from adaptive.sampling import generators, pick

    scores = torch.tensor([0.0, -1.0, -torch.inf, 2.0, 0.5, -torch.inf])
    rows = torch.zeros(4000, 1, dtype=torch.long)
    chosen = pick(scores.expand(len(rows), -1), generators(7, rows), np.arange(len(rows)))
    counts, expected = torch.bincount(chosen, minlength=6), scores.softmax(0) * len(rows)
    likely = expected > 0
    assert (counts[~likely] == 0).all()
    chi_square = ((counts - expected) ** 2 / expected)[likely].sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("config", [{}, {"gate": "max_prob"}, {"screen": 8}], ids=str)
def test_what_is_allowed_is_said_though_no_shortlist_holds_it(config, sampled, kv):
    """Shortlists hold the first 32 entries; the caller forbids the first 60."""
    short = with_exits("llama", head="norm", shortlist=32, **config)
    settings = {"suppress_tokens": list(range(60)), "policy": [0.0, 0.0], "seed": 3, "do_sample": sampled, "kv": kv}
    said = generate(short, prompts(3), **settings).sequences[:, 9:]
    assert (said >= 60).all() and len(set(said.flatten().tolist())) > 4
    if "screen" not in config and not (sampled and kv == "verify"):  # how far it drafts depends on what a head costs
        whole = with_exits("llama", head="norm", **config)
        assert torch.equal(generate(whole, prompts(3), **settings).sequences[:, 9:], said)
