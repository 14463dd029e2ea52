"""The look before training: probes are least squares, the oracle is an oracle, and the command says what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, VOCAB, tiny

from adaptive import EarlyExitModel, ExitConfig
from adaptive.objective import full_states
from adaptive.probing import fit_probe, written_states

pytest.importorskip("matplotlib", reason="it draws; comes with the extra `demo`")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("suitability")
    tiny("llama").save_pretrained(place)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(place)
    return place


def test_a_probe_finds_an_affine_map_and_prefers_less_ridge_where_there_is_one():
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(400, 16, generator=generator), torch.randn(16, 16, generator=generator)
    found, ridge = fit_probe(states, states @ weight + 3)
    assert ridge == 1e-3 and torch.allclose(found[:-1], weight, atol=0.02) and torch.allclose(
        found[-1], torch.full((16,), 3.0), atol=0.02
    )  # fmt: skip
    noise = torch.randn(40, 16, generator=generator)
    assert fit_probe(states[:40], noise)[1] == 1.0


def test_states_of_what_is_written_are_those_of_reading_it(place):
    model = EarlyExitModel.from_backbone(str(place), ExitConfig([2]))
    said = []
    multinomial = torch.multinomial
    try:
        torch.multinomial = lambda *args, **kwargs: said.append(multinomial(*args, **kwargs)) or said[-1]
        found = written_states(model, [1, 3], 3, 7, seed=0)
    finally:
        torch.multinomial = multinomial
    ids = torch.cat([torch.full((3, 1), 1), *said], 1)
    with torch.no_grad():
        states, normed, _ = full_states(model.view, ids[:, :-1], None, (1, 3))
    for row in range(3):
        assert torch.allclose(found[row][1], states[0][row], atol=1e-4)
        assert torch.allclose(found[row]["full"], normed[row], atol=1e-4)
    assert len(set(ids.flatten().tolist())) > 5


@pytest.mark.parametrize("data", [False, True])
def test_the_command_says_what_it_found(place, tmp_path, data):
    words = [sys.executable, str(ROOT / "eval" / "suitability.py"), str(place), "--output", str(tmp_path / "out")]
    words += ["--rows", "32", "--sequence_length", "12", "--positions", "80", "--exits", "2", "--risk", "0.3"]
    if data:
        text = " ".join(f"w{n % 90 + 3}" for n in range(700))
        (tmp_path / "text.txt").write_text(text)
        words += ["--data", str(tmp_path / "text.txt")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Suggested depths" in done.stdout and "| depth | FLOPs |" in done.stdout
    found = json.loads((tmp_path / "out" / "suitability.json").read_text())
    assert (tmp_path / "out" / "suitability.png").stat().st_size > 10_000
    assert [line["depth"] for line in found["depths"]] == list(range(1, LAYERS))
    costs = [line["relative_flops"] for line in found["depths"]]
    assert costs == sorted(costs) and costs[-1] < 1.05
    for kind in ("raw", "probe"):
        oracle = found[f"oracle_{kind}"]
        assert sum(oracle["shares"]) == pytest.approx(1)
        assert oracle["shares"][0] == pytest.approx(found["depths"][0][kind]["agreement"])
        assert 1 - oracle["shares"][-1] >= max(line[kind]["agreement"] for line in found["depths"]) - 1e-9
    assert len(found["suggested"]["depths"]) == 2
    assert found["suggested"]["oracle_saving"] <= found["oracle_probe"]["saving"] + 1e-9


def test_a_depth_that_is_none_is_named(place):
    words = [sys.executable, str(ROOT / "eval" / "suitability.py"), str(place), "--depths", "9"]
    wrong = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert wrong.returncode != 0 and "use depths 1 to 3" in wrong.stderr
