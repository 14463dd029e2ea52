"""Small backbones from scratch: `train/backbone.py` learns, goes on where it stopped, and the study's files fit it."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import conftest
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive import EarlyExitModel, ExitConfig
from adaptive.checked import ConfigError, build
from adaptive.config import TrainConfig

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train" / "backbone.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    return conftest.script("train/backbone")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of two files that repeat themselves."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("first", "second"):
        lines = [f"the {name} of {number} lines ends here\n" for number in range(150)]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def configure(script, texts, output, **changes):
    sizes = dict(vocabulary=280, hidden=32, layers=3, heads=2, sequence_length=32, batch_size=4)
    pace = dict(steps=40, eval_every=20, learning_rate=1e-2)
    return script.BackboneConfig(data=[str(texts)], output=str(output), **{**sizes, **pace, **changes})


def through_the_command(config):
    """Runs the script as users start it."""
    flags = [word for name, value in asdict(config).items() for word in (f"--{name}", str(value)) if name != "data"]
    command = [sys.executable, str(SCRIPT), "--data", *config.data, *flags]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_learns_and_is_a_model_like_any_other(script, texts, tmp_path, capsys, family):
    config = configure(script, texts, tmp_path, family=family, kv_heads=1 if family == "llama" else None)
    (through_the_command if family == "llama" else script.main)(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["held_out"]["nats"] < summary["held_out"]["unigram_nats"] - 1
    assert summary["step"] == 40 and summary["tokens"] == 40 * 4 * 32 >= summary["different_tokens"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == family and model.config.vocab_size == len(tokenizer) == 280
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    line = "the second of 7 lines ends here\n"
    assert tokenizer.decode(tokenizer.encode(line)) == line and tokenizer.chat_template is None
    ids = torch.tensor([tokenizer.encode(line)])
    assert model(ids, labels=ids).loss < 3.5  # log 280 is 5.6
    assert EarlyExitModel.from_backbone(str(tmp_path), ExitConfig([1, 2])).num_exits == 2
    capsys.readouterr()
    assert script.main(config) == summary and "nothing to do" in capsys.readouterr().out


def test_an_interrupted_run_ends_in_the_same_result(script, texts, tmp_path, monkeypatch):
    whole = script.main(configure(script, texts, tmp_path / "whole", steps=12, eval_every=4))
    real = script.save_state

    def stop(*args):
        real(*args)
        raise KeyboardInterrupt

    def half(tokenizer, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "tokenizer_config.json").write_text("{}")
        raise KeyboardInterrupt

    config = configure(script, texts, tmp_path / "parts", steps=12, eval_every=4)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(script.PreTrainedTokenizerFast, "save_pretrained", half)
        script.main(config)
    monkeypatch.setattr(script, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main(config)
    monkeypatch.setattr(script, "save_state", real)
    parts = script.main(config)
    assert parts["held_out"] == whole["held_out"] and parts["data_sha256"] == whole["data_sha256"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 12
    assert not list((tmp_path / "parts").glob("*.new"))
    with pytest.raises(ValueError, match="another configuration: `steps` is 12 there, 13 now"):
        script.main(replace(config, steps=13))
    # Other texts under the same configuration.
    (tmp_path / "parts" / "summary.json").unlink()
    (texts / "third.txt").write_text("the third line of them all is here " * 20)
    with pytest.raises(ValueError, match="trained on other texts"):
        script.main(config)
    (texts / "third.txt").unlink()


def test_bad_sizes_are_refused(script):
    with pytest.raises(ConfigError, match="multiple of twice the 3 `heads`"):
        script.BackboneConfig(data=["x"], output="y", steps=1, hidden=32, heads=3)
    with pytest.raises(ConfigError, match="`kv_heads` is 2 but `family` is 'gpt2'"):
        script.BackboneConfig(data=["x"], output="y", steps=1, family="gpt2", kv_heads=2)
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "--kv_heads" in shown.stdout


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_studies_of_both_families_vary_the_same(family):
    study = yaml.safe_load((ROOT / "configs" / f"study_{family}.yaml").read_text())
    base = yaml.safe_load((ROOT / study["base"]).read_text())
    plans = {}
    for name, change in study["variations"].items():
        plan = {**base, **change}
        for nested in ("exits", "loss"):
            plan[nested] = {**base[nested], **change.get(nested, {})}
        plans[name] = build(TrainConfig, plan, [])
        plans[name].exits.validate(10, 2048)
        assert plans[name].model == f"runs/{family}/model" and plans[name].states == f"runs/{family}/states"
        assert plans[name].data[0].startswith(f"runs/{family}/")
    others = yaml.safe_load((ROOT / "configs" / "study_llama.yaml").read_text())["variations"]
    for name, change in study["variations"].items():
        shared = [{k: v for k, v in c.items() if k not in ("model", "data", "states")} for c in (change, others[name])]
        assert shared[0] == shared[1], name
