"""Plain checkpoints, loaded by stock transformers."""

import json

import pytest
import torch
from conftest import prompts, tiny
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from adaptive import plain
from adaptive.config import ExitConfig
from adaptive.model import EarlyExitModel

WORDS = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


def shaken(backbone, **config) -> EarlyExitModel:
    model = EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[2, 3], **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for head in model.exits.heads:
            head.norm.weight.add_(torch.randn(head.norm.weight.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_a_draft_is_the_static_sub_model(family, tmp_path):
    model = shaken(tiny(family), head=["norm", "linear"])
    folder = plain.to_draft(model, 2, tmp_path / "draft", WORDS)
    draft, batch = AutoModelForCausalLM.from_pretrained(folder), prompts(3)
    assert draft.config.num_hidden_layers == 2 and type(draft) is type(model.backbone)
    assert len(json.loads((folder / "config.json").read_text()).get("layer_types", "ab")) == 2
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(**batch, **settings, policy=[0, float("inf")])
    assert torch.equal(draft.generate(**batch, **settings, eos_token_id=None), expected)
    assert (
        len(AutoTokenizer.from_pretrained(folder)) == 2 and "--speculative-config" in (folder / "README.md").read_text()
    )


def test_what_is_no_draft(tmp_path):
    model = shaken(tiny(), head=["norm", "linear"])
    with pytest.raises(ValueError, match=r"`depth`=3 has a head of kind 'linear'; .* as exits at \[2\] do"):
        plain.to_draft(model, 3, tmp_path / "draft", WORDS)
    with pytest.raises(ValueError, match="`depth`=1 has no exit"):
        plain.to_draft(model, 1, tmp_path / "draft", WORDS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="is not empty"):
        plain.to_draft(model, 2, tmp_path / "full", WORDS)


def test_adapters_are_merged(tmp_path):
    adapted = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False))
    model, batch = shaken(adapted, head="norm"), prompts(2)
    before = model.backbone(**batch).logits
    loaded = AutoModelForCausalLM.from_pretrained(plain.merge(model, tmp_path / "merged", WORDS))
    torch.testing.assert_close(loaded(**batch).logits, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.backbone(**batch).logits, before)
    draft = AutoModelForCausalLM.from_pretrained(plain.to_draft(model, 2, tmp_path / "draft", WORDS))
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = model.generate(**batch, **settings, policy=[0, float("inf")])
    assert torch.equal(draft.generate(**batch, **settings, eos_token_id=None), expected)
