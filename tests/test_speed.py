"""`eval/speed.py`: what it reports is there, follows from what ran, and names what did not. No time is judged."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import VOCAB, prompts, tiny

from adaptive import Certificate, EarlyExitModel, ExitConfig, ExitPolicy
from adaptive.storage import model_digest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "eval" / "speed.py"
NEW = 8
SMALL = ["--new_tokens", str(NEW), "--prompt_tokens", "6", "--rounds", "2", "--threads", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def speed():
    """The script as a module."""
    return conftest.script("eval/speed")


@pytest.fixture(autouse=True)
def same_verbosity():
    """The script silences transformers, which other tests listen to."""
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the command prints last, and writes, for a tiny model at batch 1 and 2."""
    folder = tmp_path_factory.mktemp("speed")
    tiny("llama").save_pretrained(folder / "model")
    output = folder / "results" / "speed.json"
    words = ["--model", str(folder / "model"), "--batch_sizes", "1,2", "--shares", "50", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, *SMALL],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document == json.loads(output.read_text())
    return document


def engines(document: dict, batch: int) -> dict:
    (section,) = [part for part in document["decode"] if part["batch"] == batch]
    return {entry["engine"]: entry for entry in section["engines"]}


def figures(value) -> list[float]:
    """All numbers in a part of the document."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in figures(item)]
    return [value]


def test_where_the_figures_come_from_is_said(told):
    source = told["provenance"]
    assert "speed.py --model" in source["command"] and source["model"] == told["config"]["model"]
    assert (source["seed"], source["dtype"]) == (3, "float32") and "commit" in source
    machine = source["machine"]
    assert machine["threads"] == 1 and machine["device"] and machine["cpu"] and machine["cores"] >= 1
    assert source["versions"]["torch"] == torch.__version__ and {"python", "transformers"} <= set(source["versions"])


def test_training_is_timed_against_a_forward_pass(told):
    train = told["train"]
    assert len(train["exits"]["depths"]) == 3 and set(train["ratio"]) == {"step"}
    for spread in (*train["ratio"].values(), *train["seconds"].values()):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"] < math.inf
    memory = train["memory"]
    assert memory["logits_of_one_exit"] == train["rows"] * train["tokens"] * VOCAB
    # The forward pass makes exactly those logits, so that the meter is seen to measure.
    assert memory["forward"]["largest_tensor"] == memory["logits_of_one_exit"]
    assert memory["step"]["below_logits_of_one_exit"] is True
    assert 0 < memory["step"]["largest_tensor"] < memory["logits_of_one_exit"]
    assert memory["step"]["peak_bytes"] >= 4 * memory["step"]["largest_tensor"]


@pytest.mark.parametrize("batch", [1, 2])
def test_engines_are_compared_round_by_round(told, batch):
    found = engines(told, batch)
    timed = [name for name in found if "error" not in found[name]]
    forced = {f"forced_50_at_{depth}{order}" for depth in (1, 2) for order in ("", "_together")[:batch]}
    assert {"hf_dynamic", "hf_static", "full_depth", *forced} <= set(timed)
    kinds = ("tokens_per_second", "over_hf_dynamic", "over_full_depth")
    for name in timed:
        for kind in [*kinds, *(f"decode_{kind}" for kind in kinds)]:
            assert set(found[name][kind]) == {"median", "min", "max"}
            assert all(0 < number < math.inf for number in figures(found[name][kind])), (name, kind)
        if not name.startswith(("hf", "economize")):
            assert all(0 < number < math.inf for number in figures(found[name]["ideal"]))
            assert found[name]["realised_of_ideal"].keys() == found[name]["ideal"].keys()
    assert figures(found["full_depth"]["ideal"]) == [1, 1] and found["full_depth"]["shares"] == [0, 0, 1]
    for name in forced:
        exit = found[name]["exits"].index(int(name.split("_")[3]))
        assert found[name]["shares"][exit] == 0.5 and found[name]["shares"][-1] == 0.5
        assert all(number > 1 for number in figures(found[name]["ideal"]))
    assert found["forced_50_at_1"]["ideal"]["flops"] > found["forced_50_at_2"]["ideal"]["flops"]


@pytest.mark.parametrize("batch", [1, 2])
def test_full_depth_gives_the_tokens_of_transformers(told, batch):
    (section,) = [part for part in told["decode"] if part["batch"] == batch]
    assert section["full_depth_equals_hf"] is True
    found = engines(told, batch)
    assert found["full_depth"]["tokens_as_hf"] == found["hf_static"]["tokens_as_hf"] == 1
    assert found["forced_50_at_1"]["tokens_as_hf"] < 1


def test_refusals_are_listed(told):
    refused = {name: entry for name, entry in engines(told, 2).items() if "error" in entry}
    assert {name for name in refused if not name.startswith("economize")} == {"hf_assistant_early_exit"}
    if importlib.util.find_spec("economize") is None:
        assert {entry["error"] for name, entry in refused.items() if name.startswith("economize")} == {
            "ModuleNotFoundError: No module named 'economize'"
        }
    assert set(refused["hf_assistant_early_exit"]) == {"engine", "error"}
    assert "batch_size" in refused["hf_assistant_early_exit"]["error"]
    assert "error" not in engines(told, 1)["hf_assistant_early_exit"]


def test_a_peer_that_breaks_on_the_way_leaves_the_others_as_they_were(speed, tmp_path):
    """An early exit of transformers ends GPT-2 with an error, and with fewer layers in its config."""
    tiny("gpt2").save_pretrained(tmp_path / "model")
    config = speed.SpeedConfig(model=str(tmp_path / "model"), new_tokens=NEW, prompt_tokens=6)
    plain, trained = speed.load(config, torch.device("cpu"))
    assert trained is None
    running = speed.engines(config, plain, None, prompts(1)["input_ids"])
    before, _ = running["full_depth"](None)
    with pytest.raises(Exception):  # noqa: B017 - whichever it is, it is the peer's
        running["hf_assistant_early_exit"](None)
    assert plain.view.num_layers == 4 and torch.equal(running["full_depth"](None)[0], before)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("percent", [0, 25, 50, 75, 100])
def test_a_forced_pattern_lets_its_share_of_every_row_leave(speed, percent, together):
    model = EarlyExitModel.from_backbone(tiny(), ExitConfig(depths=[1, 3], head="norm"))
    policy = speed.Forced(ExitPolicy.always(1, 2).thresholds, percent, together)
    out = model.generate(**prompts(4), policy=policy, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    left = out.trace.taken == 1
    assert (left.mean(axis=1) == percent / 100).all() and set(np.unique(out.trace.taken)) <= {1, 2}
    at_every_token = left.mean(axis=0)
    assert (np.isin(at_every_token, [0, 1]) if together else at_every_token == percent / 100).all()


def test_a_trained_run_is_timed_under_its_own_policy(speed, tmp_path):
    """Exits that are no third of the depth, bf16, and a certificate that lets every token out at once."""
    tiny().save_pretrained(tmp_path / "model")
    exits = ExitConfig(depths=[1, 2, 3], rank=4)
    model = EarlyExitModel.from_backbone(str(tmp_path / "model"), exits, dtype="bfloat16")
    certificate = dict(
        kind="risk", epsilon=0.5, delta=0.05, n=10, bound="wsr", certified=0.5, mean=0.1, harm="regret",
        tolerance=0.25, max_new_tokens=8, floor=None, thresholds=[math.inf, math.inf, 0.0], saved=0.1, predicted={},
        seed=0, data_digest="", model_digest=model_digest(model), versions={},
    )  # fmt: skip
    model.certify(Certificate(**certificate))
    model.save_pretrained(tmp_path / "run")
    config = speed.SpeedConfig(
        model=str(tmp_path / "run"),
        batch_sizes=[1],
        shares=[],
        dtype="bfloat16",
        new_tokens=NEW,
        prompt_tokens=6,
        rounds=1,
        only=["certified", "verified"],
        output=str(tmp_path / "speed.json"),
    )
    document = speed.main(config)
    found = engines(document, 1)
    assert "hf_static" not in found and "hf_dynamic" in found
    assert found["certified"]["exits"] == [1, 2, 3] and found["certified"]["shares"] == [0, 0, 1, 0]
    for name in ("verified_certified", "verified_all_at_1", "verified_all_at_2", "verified_all_at_3"):
        assert found[name]["tokens_as_hf"] == 1 and 0 < found[name]["ideal"]["flops"] <= 1
    assert found["certified"]["tokens_as_hf"] < 1
    assert found["full_depth"]["exits"] == [1, 2] and found["full_depth"]["tokens_as_hf"] == 1
    assert document["train"]["exits"]["rank"] == 4 and document["provenance"]["dtype"] == "bfloat16"


def test_prompts_come_from_where_they_are_told(speed, tmp_path, monkeypatch):
    model, text = EarlyExitModel.from_backbone(tiny(), ExitConfig(depths=[1], head="norm")), tmp_path / "some.txt"
    text.write_text("abcdefghijklmnopq", encoding="utf-8")
    monkeypatch.setattr(
        speed,
        "load_tokenizer",
        lambda model: lambda text, **_: SimpleNamespace(input_ids=[ord(letter) - ord("a") for letter in text]),
    )
    settings = dict(batch_sizes=[1, 2], prompt_tokens=4)
    found = speed.chosen(speed.SpeedConfig(prompts=str(text), **settings), model)
    assert found.tolist() == [[0, 1, 2, 3], [9, 10, 11, 12]]
    with pytest.raises(ValueError, match="17 tokens; 2 prompts of 9"):
        speed.chosen(speed.SpeedConfig(prompts=str(text), **settings | {"prompt_tokens": 9}), model)
    random = [speed.chosen(speed.SpeedConfig(prompts="random", seed=seed, **settings), model) for seed in (1, 1, 2)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    assert random[0].shape == (2, 4) and 0 <= random[0].min() and random[0].max() < VOCAB
    with pytest.raises(ValueError, match="no file"):
        speed.SpeedConfig(prompts=str(tmp_path / "missing.txt"))


def test_faults_are_told_at_once(speed, tmp_path):
    with pytest.raises(ValueError, match="shares") as caught:
        speed.SpeedConfig(rounds=0, batch_sizes=[0], shares=[101])
    assert "rounds" in str(caught.value) and "batch_sizes" in str(caught.value)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="context"):
        speed.main(speed.SpeedConfig(model=str(tmp_path), what=["decode"], new_tokens=128))


def test_the_meter_of_memory_counts_what_is_alive(speed):
    weight = torch.ones(10, 10, requires_grad=True)
    with speed.Allocations() as made:
        product = torch.ones(10, 10) @ weight  # 400 bytes each; the first is kept for the backward pass
        product = product.t().expand(5, 10, 10).relu()  # 2000 bytes; what is only a view takes none
        assert (made.largest, made.alive, made.peak) == (500, 2400, 2800)
        product.sum().backward()
        del product
        weight.grad = None
        assert made.alive == 0 and made.peak > 2800
