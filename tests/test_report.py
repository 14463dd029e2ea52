"""The report of a run: its figures are the trace's, it does not repeat itself, and it refuses what it cannot vouch for."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive import EarlyExitModel, ExitConfig

pytest.importorskip("matplotlib", reason="the report draws; it comes with the extra `demo`")
ROOT = Path(__file__).parent.parent
NEW = 12


def script(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    return script("eval/report")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a tiny model, random exits, prompts, and certificates of three budgets."""
    place = tmp_path_factory.mktemp("report")
    backbone = tiny("llama")
    backbone.generation_config.eos_token_id = [5, 23, 41, 60]  # so that answers have different lengths
    backbone.save_pretrained(place / "model")
    tokenizer = Tokenizer(models.WordLevel({f"<w{n}>": n for n in range(VOCAB)}, unk_token="<w3>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<w2>").save_pretrained(place / "model")
    exits = ExitConfig(depths=[1, 3, LAYERS], rank=4, shortlist=[None, None, 40])
    model = EarlyExitModel.from_backbone(str(place / "model"), exits)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.exits.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.exits.choose_shortlists(torch.rand(VOCAB, generator=generator))
    model.save_pretrained(place / "run")
    words = torch.randint(3, VOCAB, (60, 6), generator=generator).tolist()
    texts = [" ".join(f"<w{n}>" for n in line[: 2 + index % 4]) for index, line in enumerate(words)]
    parts = {"select": texts[:16], "certify": texts[16:48], "report": texts[48:]}
    (place / "prompts.json").write_text(json.dumps(parts))
    calibrate = script("train/calibrate")
    calibrate.main(calibrate.CalibrationConfig(
        str(place / "run"), str(place / "prompts.json"), risks=[], budgets=[0.7, 0.95], max_new_tokens=NEW))
    return place / "run"
