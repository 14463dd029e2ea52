"""Replayed steps give what steps of single kernels give. Here without a GPU: the work of the graphs runs as it is."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from conftest import prompts, tiny
from test_parity import generate, with_exits

from adaptive import placed, replay
from adaptive.config import ExitConfig
from adaptive.model import EarlyExitModel
from adaptive.policy import BudgetPolicy, ExitPolicy


class Turns(ExitPolicy):
    """Rows take the exits, and the full depth, in turns."""

    def leaves(self, exit, scores, progress):
        return (progress.tokens + np.arange(len(scores))) % 3 == exit


POLICIES = {
    "full": ExitPolicy((math.inf, math.inf)),
    "asked": ExitPolicy((2.0, 2.0)),
    "first": ExitPolicy((0.0, math.inf)),
    "second": ExitPolicy((math.inf, 0.0)),
    "gates": ExitPolicy((0.5, 0.5)),
    "turns": Turns((0.0, 0.0)),
    "budget": BudgetPolicy((2.0, 2.0), mean_depth=2.5),
}
HEADS = {
    "norm": {"head": "norm"},
    "linear_mlp": {"head": "linear_mlp", "gate": "mlp"},
    "shortlist": {"head": "norm", "shortlist": 32},
    "screen": {"head": "norm", "shortlist": 32, "screen": 8},
    "projected": {"head": "linear", "fill": "projected"},
}


STATIC = {"cache_implementation": "static"}


@pytest.fixture
def replayed(monkeypatch):
    """Replays on a CPU; returns how many steps were."""
    count = []
    step = replay.Replay.step
    monkeypatch.setattr(replay, "DEVICES", ("cpu",))
    monkeypatch.setattr(replay.Replay, "step", lambda self, live: count.append(len(live)) or step(self, live))
    return count


def both(model, inputs, replayed, **settings):
    """What a model gives replayed and not."""
    here = generate(model, inputs, **settings)
    assert not replayed, "nobody has asked for it"
    there = generate(model, inputs, **settings, **STATIC)
    steps = len(replayed)
    replayed.clear()
    return there, here, steps


def same(there, here) -> None:
    """Asserts equal tokens, traces, and logits but for the order of summation."""
    assert torch.equal(there.sequences, here.sequences)
    for name in ("taken", "headed", "context", "behind", "caught_up"):
        assert (getattr(there.trace, name) == getattr(here.trace, name)).all(), name
    assert np.allclose(there.trace.scores, here.trace.scores, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_replayed_steps_are_those_of_the_walk(family, batch, policy, replayed):
    model = with_exits(family)
    there, here, steps = both(model, prompts(batch), replayed, policy=policy, max_new_tokens=14, output_logits=True)
    same(there, here)
    assert steps == 13, "the first token comes from the prompt"
    for one, other in zip(there.logits, here.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_every_head_and_fill_is_replayed(config, replayed):
    model = with_exits("llama", **config)
    there, here, steps = both(model, prompts(3), replayed, policy=POLICIES["turns"], max_new_tokens=14)
    same(there, here)
    assert steps == 13 and set(there.trace.taken.ravel().tolist()) == {0, 1, 2}


def test_rows_that_end_and_rows_under_policies_of_their_own(replayed):
    model, inputs = with_exits("llama"), prompts(3)
    settings = {"policy": [POLICIES["first"], POLICIES["turns"], POLICIES["full"]], "max_new_tokens": 14}
    said = generate(model, inputs, **settings).sequences[:, 9:]
    there, here, steps = both(model, inputs, replayed, **settings, eos_token_id=int(said[1, 4]))
    same(there, here)
    assert steps and (there.trace.taken == -1).any()


def test_sampled_rows_alone_are_rows_in_a_batch(replayed):
    model, inputs = with_exits("llama"), prompts(3)
    settings = {"policy": POLICIES["gates"], "do_sample": True, "max_new_tokens": 10} | STATIC
    together = generate(model, inputs, seed=[3, 4, 5], **settings)
    assert len(np.unique(together.trace.taken, axis=0)) == 3, "rows leave where others stay"
    for row in range(3):
        keep = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row : row + 1, keep]}
        said = generate(model, alone, seed=[3 + row], **settings).sequences
        assert torch.equal(said[0, -10:], together.sequences[row, 9:])


def test_room_grows_and_graphs_are_used_again(replayed, monkeypatch):
    monkeypatch.setattr(replay, "SMALLEST", 8)
    model = with_exits("llama")
    settings = {"policy": POLICIES["turns"], "max_new_tokens": 40}
    there, here, _ = both(model, prompts(2), replayed, **settings)
    same(there, here)
    kept = list(replay._kept[model.exits])
    assert [each.capacity for each in kept] == [16, 32, 64]
    again, _, _ = both(model, prompts(2, longest=40), replayed, **settings | {"max_new_tokens": 20})
    assert replay._kept[model.exits] == kept and again.sequences.shape == (2, 60), "none was made anew"
    with torch.no_grad():
        model.view.blocks[2].mlp.down_proj.weight.mul_(0.5)
    there, here, _ = both(model, prompts(2, longest=40), replayed, **settings | {"max_new_tokens": 20})
    same(there, here)
    assert not set(replay._kept[model.exits]) & set(kept), "another weight, other graphs"
    assert not torch.equal(there.sequences, again.sequences)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "gpt2"])
def test_what_is_not_known_walks(family, replayed):
    there, here, steps = both(with_exits(family), prompts(2), replayed, policy=POLICIES["turns"])
    same(there, here)
    assert steps == 0


def test_blocks_heads_baselines_shared_prompts_and_growing_angles_walk(replayed):
    inputs = prompts(2)
    for config in ({"head": "block"}, {"gate": "max_prob"}):
        assert both(with_exits("llama", **config), inputs, replayed, policy=POLICIES["gates"])[2] == 0
    model = with_exits("llama")
    for kv in ("recompute", "verify"):
        assert both(model, inputs, replayed, policy=POLICIES["gates"], kv=kv)[2] == 0
    assert both(model, inputs, replayed, policy=POLICIES["gates"], probe=True)[2] == 0
    twice = {name: tensor[:1].expand(2, -1) for name, tensor in inputs.items()}
    assert both(model, twice, replayed, policy=[POLICIES["gates"], POLICIES["full"]])[2] == 0
    growing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    backbone = tiny("llama", rope_parameters=growing)
    assert both(EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[1])), inputs, replayed, policy=[0.0])[2] == 0


def test_scaled_embeddings_and_autocast_walk(replayed, monkeypatch):
    model = with_exits("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert both(model, prompts(1), replayed, policy=POLICIES["gates"])[2] == 0
    start = model.view.start
    monkeypatch.setattr(model.view, "start", lambda *args: (start(*args)[0] * 2, start(*args)[1]))
    assert not placed.Placed.fits(model.view)
    assert both(model, prompts(1), replayed, policy=POLICIES["gates"])[2] == 0


def test_graphs_made_in_inference_mode_serve_outside_of_it(replayed):
    model, settings = with_exits("llama"), {"policy": POLICIES["gates"], "max_new_tokens": 6}
    with torch.inference_mode():
        inside = generate(model, prompts(2), **settings, **STATIC)
    outside = generate(model, prompts(2), **settings, **STATIC)
    assert replayed and torch.equal(inside.sequences, outside.sequences)


def test_what_is_allowed_is_said_though_no_shortlist_holds_it(replayed):
    model = with_exits("llama", head="norm", shortlist=32)
    settings = {"suppress_tokens": list(range(60)), "policy": POLICIES["first"]}
    there, here, steps = both(model, prompts(3), replayed, **settings)
    same(there, here)
    assert steps and (there.sequences[:, 9:] >= 60).all()


def test_one_token_makes_no_graphs(replayed):
    model = with_exits("llama")
    generate(model, prompts(2), policy=POLICIES["gates"], max_new_tokens=1, **STATIC)
    assert not replayed and model.exits not in replay._kept


def test_graphs_go_with_their_model(replayed):
    model = with_exits("llama")
    generate(model, prompts(1), policy=POLICIES["gates"], **STATIC)
    kept = weakref.ref(replay._kept[model.exits][0])
    # On a CPU, where the work is kept as it is, it holds the model; on a GPU it holds memory alone.
    kept().segments, kept().leave, kept().walk = [], [], None
    del model
    gc.collect()
    assert kept() is None
