"""What is saved of a model, and what comes back."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, prompts, tiny
from test_model import batch

from adaptive import EarlyExitModel, ExitConfig, storage


@pytest.mark.parametrize("head,kv", [("norm", "own"), ("linear", "own"), ("mlp", "own"), ("block", "shared")])
def test_what_is_saved_comes_back(head, kv, tmp_path):
    backbone = tiny("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    config = ExitConfig(depths=[2, 4], head=[head, "norm"], head_kv=kv, layers=2, shortlist=[None, 30], gate="mlp")
    model = EarlyExitModel.from_backbone(str(tmp_path / "backbone"), config)
    model.exits.choose_shortlists(torch.rand(VOCAB, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "saved")
    again = EarlyExitModel.from_pretrained(tmp_path / "saved")
    settings = dict(max_new_tokens=8, do_sample=False, policy=[0.5, 0.5], return_dict_in_generate=True)
    ours, theirs = (m.generate(**prompts(3), **settings) for m in (model, again))
    assert torch.equal(ours.sequences, theirs.sequences) and (ours.trace.taken == theirs.trace.taken).all()
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {"exits.safetensors", "exit_config.json", "README.md"}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_trained_backbone_is_saved_beside_its_exits(mode, tmp_path):
    import peft

    tiny("llama").save_pretrained(tmp_path / "backbone")
    model = EarlyExitModel.from_backbone(str(tmp_path / "backbone"), ExitConfig(depths=[2], head="mlp"))
    if mode == "lora":
        model.backbone = peft.get_peft_model(model.backbone, peft.LoraConfig(r=4, target_modules="all-linear"))
    model.train_mode(mode)
    with torch.no_grad():
        for parameter in model.backbone_parameters():
            parameter.add_(0.02)
    model.eval().save_pretrained(tmp_path / "saved")
    again = EarlyExitModel.from_pretrained(tmp_path / "saved")
    ids = batch()["input_ids"]
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    untouched = EarlyExitModel.from_backbone(str(tmp_path / "backbone"), ExitConfig(depths=[2]))
    assert not torch.allclose(again(ids).logits, untouched(ids).logits, atol=1e-2)


def test_damaged_and_foreign_files_are_refused_or_warned_of(tmp_path, caplog):
    tiny("llama").save_pretrained(tmp_path / "backbone")
    model = EarlyExitModel.from_backbone(str(tmp_path / "backbone"), ExitConfig(depths=[2]))
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    weights, record = (folder / "exits.safetensors").read_bytes(), (folder / "exit_config.json").read_text()

    def refused(match):
        with pytest.raises(ValueError, match=match):
            EarlyExitModel.from_pretrained(folder)

    (folder / "exits.safetensors").write_bytes(weights[:-10])
    refused("truncated or was changed")
    (folder / "exits.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("truncated or was changed")
    (folder / "exits.safetensors").write_bytes(weights)
    (folder / "exit_config.json").write_text(record[:-20])
    refused("is not JSON")
    (folder / "exit_config.json").write_text(json.dumps(json.loads(record) | {"format": 99}))
    refused("upgrade")
    (folder / "exit_config.json").write_text(record)
    with pytest.raises(ValueError, match="do not fit this backbone"):
        EarlyExitModel.from_pretrained(folder, backbone=tiny("llama", hidden_size=64))
    assert "other weights" not in caplog.text
    EarlyExitModel.from_pretrained(folder, backbone=tiny("llama", seed=1))
    assert "trained on other weights" in caplog.text
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        EarlyExitModel.from_pretrained(str(tmp_path / "nowhere"))


def test_a_model_without_a_name_is_saved_whole(llama, tmp_path):
    model = EarlyExitModel(llama, ExitConfig(depths=[2]))
    model.save_pretrained(tmp_path)
    again = EarlyExitModel.from_pretrained(tmp_path)
    ids = batch()["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "copy")
    copied = EarlyExitModel.from_pretrained(tmp_path / "copy")
    assert torch.equal(copied(ids).logits, model(ids).logits)


def test_an_earlier_adapter_is_not_taken_for_a_later_model(tmp_path):
    import peft

    tiny("llama").save_pretrained(tmp_path / "backbone")
    for adapted in (True, False):
        model = EarlyExitModel.from_backbone(str(tmp_path / "backbone"), ExitConfig(depths=[2]))
        if adapted:
            model.backbone = peft.get_peft_model(model.backbone, peft.LoraConfig(r=4, init_lora_weights=False))
            model.train_mode("lora")
        model.save_pretrained(tmp_path / "saved")
    again = EarlyExitModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(batch()["input_ids"]).logits, model(batch()["input_ids"]).logits)


@pytest.mark.parametrize("moves", [None, 2, 3], ids=["weights", "two-moves", "three-moves"])
def test_a_full_disk_leaves_the_earlier_save(moves, tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "backbone")
    model = EarlyExitModel.from_backbone(str(tmp_path / "backbone"), ExitConfig(depths=[2]))
    model.save_pretrained(tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        model.exits.heads[0].up.weight.add_(1)
    if moves is None:
        monkeypatch.setattr(storage, "save_file", full)
    else:
        real, calls = os.replace, iter(range(99))
        monkeypatch.setattr(storage.os, "replace", lambda *a: full() if next(calls) == moves else real(*a))
    with pytest.raises(OSError, match="untouched"):
        model.save_pretrained(tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before


def test_push_uploads_what_save_writes_and_keeps_a_card(llama, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls.append((repo_id, private, exist_ok, self.token))
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def file_exists(self, repo, name):
            return name == "README.md"

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir()), ignore_patterns))
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = EarlyExitModel(llama, ExitConfig(depths=[2]))
    assert model.push_to_hub("exits", private=True, token="t") == "https://hub/commit"
    assert calls[0] == ("exits", True, True, "t")
    assert calls[1][0] == "me/exits" and calls[1][2] == ["README.md"]
    assert {"exits.safetensors", "exit_config.json", "model.safetensors"} <= set(calls[1][1])
