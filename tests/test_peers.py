"""The contest with economize on a tiny model: both sides are measured by the same meter, and depths are counted."""

import json
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny

from adaptive import EarlyExitModel, ExitConfig
from adaptive.data import save_tokens

economize = pytest.importorskip("economize", reason="comes with the extra `peers`")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def peers():
    """The script as a module."""
    return conftest.script("eval/peers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, a tokenizer for it, its exits, rows to train on and prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("peers")
    tiny("llama").save_pretrained(place / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(place / "model")
    model = EarlyExitModel.from_backbone(str(place / "model"), ExitConfig(depths=[1, 3], head="norm"))
    model.save_pretrained(place / "run")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (8, 16), generator=generator).numpy().astype(np.int32)
    save_tokens(place / "rows.safetensors", {"input_ids": ids, "labels": ids, "attention_mask": np.ones_like(ids)})
    words = torch.randint(3, VOCAB, (40, 5), generator=generator).tolist()
    texts = [" ".join(f"w{n}" for n in line) for line in words]
    parts = {"select": texts[:8], "certify": texts[8:32], "report": texts[32:]}
    (place / "prompts.json").write_text(json.dumps(parts))
    return place


def test_both_sides_are_judged_alike(peers, place, tmp_path):
    config = peers.PeersConfig(
        run=str(place / "run"), prompts=str(place / "prompts.json"), output=str(tmp_path / "peers.json"),
        data=[str(place / "rows.safetensors")], epsilon=0.5, delta=0.2, max_new_tokens=6, certify=24, points=4, steps=2,
        resplits=5, speed_prompts=8,
    )  # fmt: skip
    document = peers.main(config)
    assert list(document["sides"]) == ["adaptive", "economize"]
    for side in document["sides"].values():
        assert 0 <= side["violations"] <= 1 and side["calibration_seconds"] > 0
        assert 0 < side["executed_layer_share"] <= 1 and side["harm"] <= 1
        assert set(side["tokens_per_second"]) == {"1", "8"}
    assert json.loads((tmp_path / "peers.json").read_text())["sides"] == document["sides"]
    again = peers.economized(EarlyExitModel.from_pretrained(place / "run"), {}, config)
    assert again.training == document["sides"]["economize"]["training_seconds"], "its training is kept"


def test_its_depths_are_its_own_counts_and_never_leaving_is_our_full_depth(peers, place, tmp_path):
    config = peers.PeersConfig(
        run=str(place / "run"), prompts="x", output=str(tmp_path / "y.json"), data=[str(place / "rows.safetensors")],
        max_new_tokens=6, points=3, steps=2,
    )  # fmt: skip
    model = EarlyExitModel.from_pretrained(place / "run")
    side = peers.economized(model, {}, config)
    prompts = [[5, 9, 12], [7, 30]]
    from adaptive import ExitPolicy, outcomes

    full, _ = outcomes.answer(model, prompts, ExitPolicy.full(2), 6)
    said, trace = side.answer(prompts, 1.0)
    assert said == full and (trace.depth == 4).all()
    assert side.meter.costs.price(trace).saved["depth"] == 0
    said, trace = side.answer(prompts[:1], 0.0)
    assert trace.depth[0].tolist() == [4, 1, 1, 1, 1, 1], "the prompt and the first token run all layers"
    assert side.meter.costs.price(trace).relative_flops < 1
