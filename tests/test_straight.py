"""Blocks without their modules: the same bits, and the modules wherever somebody has changed one."""

import peft
import pytest
import torch
from conftest import LAYERS, prompts, tiny
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from adaptive.backbone import Backbone
from adaptive.config import ExitConfig
from adaptive.model import EarlyExitModel
from adaptive.turned import few

STRAIGHT = ["llama", "mistral", "qwen2", "qwen3"]


def generated(model, **changes):
    settings = dict(do_sample=False, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    settings["policy"] = [float("inf"), 0.5]
    return model.generate(**prompts(3), **settings | changes)


def runs_modules(view: Backbone) -> bool:
    return view.runner() == view.run


@pytest.mark.parametrize("family", STRAIGHT)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_the_modules(family, threads, dtype, monkeypatch):
    backbone = tiny(family).to(dtype)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.dim() == 1:  # gains of norms, and biases: fresh ones are all 1, and all 0
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model = EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[1, 3], head="linear"))
    assert model.view.straightens and not runs_modules(model.view)
    # Said, not started: real ones take minutes where cores are busy. From two on, single states are turned.
    monkeypatch.setattr("adaptive.turned.torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("adaptive.turned.torch.get_num_threads", lambda: threads)
    out = generated(model)
    monkeypatch.setattr(model.view, "straightens", False)
    plain = generated(model)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.parametrize(("capability", "turns"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_products_are_turned_where_that_was_seen_to_be_faster(capability, turns, monkeypatch):
    monkeypatch.setattr("adaptive.turned.torch.backends.cpu.get_cpu_capability", lambda: capability)
    with torch.no_grad():
        assert few(torch.zeros(3, 1, 8)) is turns


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "olmo2", "qwen3_moe"])
def test_other_families_run_as_they_are(family):
    assert runs_modules(Backbone(tiny(family)))


def test_a_block_that_does_something_else_is_run_as_it_is():
    class Doubled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    backbone = tiny()
    backbone.model.layers[1].mlp.__class__ = Doubled
    assert runs_modules(Backbone(backbone))


def test_whoever_hooks_a_module_sees_every_token():
    model = EarlyExitModel.from_backbone(tiny(), ExitConfig(depths=[2], head="norm"))
    settings = dict(do_sample=False, max_new_tokens=5, policy=[float("inf")])
    seen = []
    handle = model.backbone.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    hooked = model.generate(**prompts(1), **settings)
    assert len(seen) == 5
    handle.remove()
    assert not runs_modules(model.view)
    assert torch.equal(model.generate(**prompts(1), **settings), hooked) and len(seen) == 5


def test_hooks_on_all_modules_are_called():
    view = Backbone(tiny())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert runs_modules(view)
    finally:
        handle.remove()
    assert not runs_modules(view)


@pytest.mark.parametrize("wrapped", ["input_layernorm", "self_attn", "mlp", "down_proj"])
def test_what_peft_wraps_runs_as_modules(wrapped):
    config = peft.LoraConfig(target_modules=["embed_tokens"], modules_to_save=[wrapped], r=2)
    assert runs_modules(Backbone(peft.get_peft_model(tiny(), config)))


def test_adapters_quantized_layers_and_training_run_as_modules():
    adapted = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert runs_modules(Backbone(adapted))

    class Packed(nn.Linear):
        pass

    view = Backbone(tiny())
    assert not runs_modules(view)
    view.blocks[LAYERS - 1].mlp.up_proj.__class__ = Packed
    assert runs_modules(view)
    view = Backbone(tiny())
    view.inner.train()
    assert runs_modules(view)


def test_weights_that_were_replaced_are_used():
    model = EarlyExitModel.from_backbone(tiny(), ExitConfig(depths=[2], head="norm"))
    before = generated(model, policy=[float("inf")]).logits[-1]
    with torch.no_grad():
        block = model.backbone.model.layers[3]
        block.mlp.down_proj.weight = nn.Parameter(2 * block.mlp.down_proj.weight)
    after = generated(model, policy=[float("inf")])
    assert not torch.equal(before, after.logits[-1])
    expected = model.backbone.generate(**prompts(3), max_new_tokens=12, do_sample=False)
    assert torch.equal(after.sequences, expected)
