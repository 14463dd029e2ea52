"""What training is given: conversations, templates, tokenizers and settings of other models."""

import json

import conftest
import pytest
import torch
from conftest import VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive import EarlyExitModel, ExitConfig, rows, states

text = conftest.script("train/text")


def words(**named):
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def test_a_template_that_trims_what_the_user_says_has_an_opening():
    tokenizer = words(eos_token="w5")
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] | trim }} w2 {% endfor %}"
    assert text.opening_of(tokenizer) == [1]


def test_a_conversation_keeps_its_first_token(tmp_path):
    tokenizer = words(bos_token="w1", eos_token="w2")  # as SmolLM2: its template writes bos, its tokenizer does not
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "w7 w8", "answer": "w9"}))
    made = rows.load_rows([str(tmp_path / "a.jsonl")], str(tmp_path / "model"), 8)
    assert made["input_ids"].tolist() == [[1, 7, 8, 2, 1, 9, 2, 2]]


def test_a_shared_block_head_has_no_more_layers_than_are_before_it():
    with pytest.raises(ValueError, match="`layers` is 2"):
        ExitConfig(depths=[1, 3], head=["block", "linear"], head_kv="shared", layers=2)
    ExitConfig(depths=[1, 3], head=["linear", "block"], head_kv="shared", layers=2)


def test_mlp_heads_of_blocks_of_another_form_add_nothing_at_first():
    model = EarlyExitModel.from_backbone(tiny("olmo2"), ExitConfig([2], head="mlp"))
    state = torch.randn(5, 32)
    assert torch.equal(model.exits.heads[0].mlps[0](state), state)


def test_tokenizer_without_end_is_refused(tmp_path):
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("w7 " * 20)
    with pytest.raises(ValueError, match="end-of-text"):
        rows.load_rows([str(tmp_path / "a.txt")], str(tmp_path / "model"), 8)


def test_states_of_another_configuration_are_not_taken(tmp_path):
    ids = torch.randint(3, VOCAB, (4, 8), dtype=torch.int32)
    some = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for theta in (10000.0, 10.0):
        model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": theta})
        found.append(states.with_states(EarlyExitModel.from_backbone(model, ExitConfig([1])), some, tmp_path)["states"])
    assert not torch.equal(*found)
