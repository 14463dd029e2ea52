"""Prices against what torch counts while tiny models of several families really run."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import tiny
from torch.utils.flop_counter import FlopCounterMode

from adaptive import EarlyExitModel, ExitConfig
from adaptive.costs import Costs
from adaptive.kv import KV
from adaptive.policy import ExitPolicy, Trace

torch.set_num_threads(1)

FAMILIES = ["llama", "gpt2", "gemma3", "qwen3_moe"]
PROMPT, NEW = 6, 8
families = pytest.mark.parametrize("family", FAMILIES)


def eager(family: str, depths=(1, 2, 3), **exits) -> EarlyExitModel:
    """A random model whose gates tell tokens apart, in operations that torch's counter sees."""
    experts = {"_experts_implementation": "eager"} if "moe" in family else {}
    backbone = tiny(family, _attn_implementation="eager", **experts)
    model = EarlyExitModel.from_backbone(backbone, ExitConfig(list(depths), rank=3, **exits))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.gate_parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model


def sampled(wanted, states, weight, *args, out_val=None, **kwargs) -> int:
    """FLOPs of a product of which only the entries of a sparse tensor are wanted: torch counts none."""
    return 2 * wanted.values().numel() * states.shape[1]


sampled._get_raw = True  # tensors, not their shapes: a sparse one's says nothing of how many are wanted
SAMPLED = {torch.ops.aten.sparse_sampled_addmm: sampled}


def count(run) -> int:
    """FLOPs that torch counts during `run()`, rotary tables left out."""
    with FlopCounterMode(display=False, custom_mapping=SAMPLED) as counter, torch.no_grad():
        run()
    modules = counter.get_flop_counts().items()
    return counter.get_total_flops() - sum(sum(ops.values()) for name, ops in modules if name.endswith("rotary_emb"))


def prefilled(model: EarlyExitModel, tokens: int) -> tuple[KV, torch.Tensor, list]:
    """K/V of a prompt, and what `start` gives for the token behind it."""
    view, ids = model.view, torch.arange(tokens + 1)[None]
    cache = KV(view.num_layers, tokens + 1, 1)
    with torch.no_grad():
        hidden, calls = view.start(ids[:, :tokens], None, None, cache)
        view.run(hidden, calls, 0, view.num_layers)
        cache.column = tokens
        return cache, *view.start(ids[:, tokens:], None, torch.tensor([[tokens]]), cache)


def windowless(costs: Costs) -> Costs:
    """What eager attention multiplies: everything, and a mask over what lies outside of the window."""
    shape, exits = copy.deepcopy((costs.shape, costs.exits))
    for block in [*shape["blocks"], *(block for exit in exits for block in exit["blocks"])]:
        block["window"] = None
    return Costs(shape, exits)


def masked(columns: int, blocks: list[dict]) -> int:
    """FLOPs of eager attention between the columns of one pass that a causal mask throws away."""
    return sum(2 * block["attention"] for block in blocks) * columns * (columns - 1) // 2


@families
@pytest.mark.parametrize("context", [7, 12])
def test_one_step_at_full_depth(family, context):
    model = eager(family)
    view, (_, hidden, calls) = model.view, prefilled(model, context - 1)
    counted = count(lambda: view.logits(view.norm(view.run(hidden, calls, 0, view.num_layers))))
    assert windowless(model.costs).by_exit(context, [False] * 3)[-1] == counted
    beyond = 2 * 2 * 4 * (8 + 8) * max(context - 6, 0) if family == "gemma3" else 0
    assert model.costs.by_exit(context, [False] * 3)[-1] == counted - beyond


@families
def test_one_step_that_leaves(family):
    model = eager(family, gate="mlp", shortlist=[None, 20, None])
    view, exits = model.view, model.exits
    for index, depth in enumerate(model.depths):
        cache, hidden, calls = prefilled(model, 5)

        def step(index=index, depth=depth, cache=cache, hidden=hidden, calls=calls):
            state = view.run(hidden, calls, 0, depth)
            view.fill(state, calls, depth, view.num_layers, cache)
            exits.gates[index].score(state)
            exits.logits(view, index, exits.heads[index](state)[:, 0])

        assert model.costs.by_exit(6, [other == index for other in range(3)])[index] == count(step)


@families
def test_a_prompt(family):
    model = eager(family)
    view, cache = model.view, KV(4, 20, 1)
    counted = count(lambda: view.run(*view.start(torch.arange(10)[None], None, None, cache), 0, view.num_layers))
    assert windowless(model.costs).prefill_flops(10) + masked(10, model.costs.shape["blocks"]) == counted


HEADS = {
    "norm": {"head": "norm"},
    "linear": {"head": "linear", "shortlist": [10, None, 30]},
    "screen": {"head": "linear", "shortlist": [10, None, 30], "screen": 6},
    "mlp": {"head": "mlp", "layers": 2, "gate": "mlp"},
    "own": {"head": "block", "layers": 2, "depths": (2, 3, 4), "shortlist": [None, None, 30]},
    "shared": {"head": "block", "head_kv": "shared"},
    "max_prob": {"head": "linear", "gate": "max_prob"},
    "own_margin": {"head": ["norm", "block", "linear"], "gate": "margin"},
    "similarity": {"head": "norm", "gate": "similarity"},
}
CASES = [("llama", heads) for heads in HEADS] + [
    ("gpt2", "linear"),
    ("gpt2", "screen"),
    ("gpt2", "own"),
    ("gemma3", "own"),
    ("gemma3", "shared"),
    ("qwen3_moe", "mlp"),
    ("qwen3_moe", "own"),
]
# Where waiting makes a difference: what is computed at an exit, whose K/V it has, what a family's blocks cost.
WAITING = [("llama", heads) for heads in ("norm", "screen", "own", "shared", "own_margin")] + [
    ("gpt2", "own"),
    ("gemma3", "own"),
    ("qwen3_moe", "own"),
]


def generate(model: EarlyExitModel, **kwargs) -> tuple[Trace, int]:
    """A trace of sampled generation, and the FLOPs counted during it."""
    prompt, traces = torch.arange(3, 3 + PROMPT)[None], []
    counted = count(
        lambda: traces.append(
            model.generate(
                prompt, max_new_tokens=NEW, do_sample=True, seed=0, return_dict_in_generate=True, **kwargs
            ).trace
        )
    )
    return traces[0], counted


def priced(model: EarlyExitModel, trace: Trace) -> int:
    """FLOPs of a whole generation, those that eager attention throws away included."""
    costs = windowless(model.costs)
    blocks, stops = costs.shape["blocks"], [*trace.exits, trace.layers]
    wasted = masked(PROMPT, blocks)
    for part in [trace] if trace.rejected is None else [trace, trace.rejected]:
        for index, exit in enumerate(costs.exits):
            wasted += sum(masked(int(columns), exit["blocks"]) for columns in part.caught_up[0, :, index])
            segment = blocks[stops[index] : stops[index + 1]]
            wasted += sum(masked(int(count) + 1, segment) for count in part.behind[0, :, index])
    return costs.prefill_flops(PROMPT) + int(costs.price(trace).flops.sum()) + wasted


@pytest.mark.parametrize(("family", "heads"), CASES)
def test_a_whole_generation(family, heads):
    model = eager(family, **HEADS[heads])
    probe, counted = generate(model, probe=True)
    assert probe.headed.all() and priced(model, probe) == counted
    middle = [float(np.quantile(probe.scores[0, :, index], 0.6)) for index in range(3)]
    taken = set()
    for thresholds in (middle, [None, middle[1], 0.0]):
        trace, counted = generate(model, policy=thresholds)
        assert priced(model, trace) == counted
        taken |= set(trace.taken[0].tolist())
    assert len(taken) >= 3, "tokens should leave at different exits here"


@pytest.mark.parametrize("kv", ["recompute", "verify"])
@pytest.mark.parametrize(("family", "heads"), WAITING)
def test_a_whole_generation_in_which_tokens_wait(family, heads, kv, monkeypatch):
    monkeypatch.setattr("adaptive.drafting.Drafting._best", lambda self: 4)
    model = eager(family, **HEADS[heads])
    probe = generate(model, probe=True)[0]
    middle = [float(np.quantile(probe.scores[0, :, index], 0.6)) for index in range(3)]
    waited = thrown = 0
    for thresholds in (middle, [middle[0], None, None], [None, middle[1], 0.0], [0.0, None, 0.0]):
        trace, counted = generate(model, policy=thresholds, kv=kv)
        assert priced(model, trace) == counted
        waited += trace.behind.sum()
        thrown += 0 if trace.rejected is None else trace.rejected.valid.sum()
    assert waited and (kv == "recompute" or thrown), "some tokens should wait here, and some drafts be thrown away"


@dataclass(frozen=True)
class Mixed(ExitPolicy):
    """At two tokens of three all rows leave, at the third only the first row does."""

    def leaves(self, exit, scores, progress):
        together = progress.tokens % 3 > 0
        return np.where(together, exit == progress.tokens % 2, (np.arange(len(scores)) == 0) & (exit == 0))


@pytest.mark.parametrize(("family", "heads"), [("llama", "linear"), ("gemma3", "screen"), ("gpt2", "linear")])
def test_a_batch_in_which_those_who_left_run_along(family, heads):
    model, rows = eager(family, **HEADS[heads]), 3
    prompt, traces = torch.arange(3, 3 + PROMPT).expand(rows, -1), []
    settings = dict(max_new_tokens=NEW, do_sample=True, return_dict_in_generate=True, kv="recompute", seed=0)
    settings["policy"] = Mixed((0.5, 0.5, 0.5))
    counted = count(lambda: traces.append(model.generate(prompt, **settings).trace))
    trace, costs = traces[0], windowless(model.costs)
    blocks, stops = costs.shape["blocks"], [0, *trace.exits, trace.layers]
    analytic = rows * (costs.prefill_flops(PROMPT) + masked(PROMPT, blocks)) + int(costs.price(trace).flops.sum())
    for index, exit in enumerate(stops[1:-1]):
        width = trace.behind[..., index] + (trace.depth > exit)
        analytic += sum(masked(int(each), blocks[exit : stops[index + 2]]) for each in width.flatten())
    assert analytic == counted
    along = (trace.behind > 0) & (trace.depth[..., None] <= np.asarray(trace.exits))
    assert along.any() and (trace.behind.max(axis=(0, 1)) > 1).any(), "some should run along, and some wait"
    alone = model.generate(prompt[:1], **settings).trace
    assert (alone.taken == trace.taken[:1]).all() and not (alone.behind == trace.behind[:1]).all()
    ours, theirs = costs.price(trace).relative_bytes, costs.price(alone).relative_bytes
    assert theirs < ours <= 1.1, "who runs along in a batch reads the blocks' weights"
