"""What exporting does to a model, as eval/exported.py tells it."""

import json
from pathlib import Path

import conftest
import pytest
from conftest import VOCAB
from test_export import made, tokenizer

from adaptive import session

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported():
    """The script as a module."""
    return conftest.script("eval/exported")


def test_fp32_is_torch_and_int8_is_not_quite(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "MANY", 16)
    model = made()
    model.backbone.save_pretrained(tmp_path / "model")
    words = tokenizer()
    words.eos_token = "w2"
    words.save_pretrained(tmp_path / "model")
    model.backbone.name_or_path = str(tmp_path / "model")
    model.save_pretrained(tmp_path / "run")
    lines = [" ".join(f"w{3 + (7 * start + step) % (VOCAB - 3)}" for step in range(40)) for start in range(4)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"page": line}) + "\n" for line in lines))
    config = exported.ExportedConfig(run=str(tmp_path / "run"), text=str(tmp_path / "text.jsonl"), column="page",
                                     precisions=["fp32", "int8"], sequence_length=32, prompts=3, prompt=6, new=8,
                                     output=str(tmp_path / "out.json"))  # fmt: skip
    document = exported.main(config)
    assert document == json.loads((tmp_path / "out.json").read_text())
    torchs, fp32, int8 = (document["results"][name] for name in ("torch", "fp32", "int8"))
    assert fp32["perplexity"] == pytest.approx(torchs["perplexity"], rel=1e-4)
    assert fp32["same_exit"] == fp32["top_token_agrees"] == fp32["answers_alike"] == 1.0 and fp32["left_early"] > 0.2
    assert fp32["behind_a_prompt"]["perplexity"] == pytest.approx(torchs["second_halves"], rel=1e-4)
    assert fp32["behind_a_prompt"]["logit_difference_most"] < 1e-3
    assert int8["behind_a_prompt"]["logit_difference_mean"] > int8["logit_difference_mean"], "7 bits are coarser"
    assert fp32["logit_difference_most"] < 1e-3 < int8["logit_difference_most"]


def test_a_row_counts_up_to_its_first_other_token(exported):
    class Traced:
        def __init__(self, taken):
            self.taken, self.exits = exported.np.array(taken), (1, 3)

    ours = [[5, 6, 7], [5, 6]], Traced([[0, 1, 1], [2, 2, -1]])
    theirs = [[5, 9, 7], [5, 6]], Traced([[0, 2, 1], [2, 0, -1]])
    # Row 0: two tokens count, the second one's exits differ; row 1: two, and again the second one's.
    assert exported.leaving(ours, theirs) == {
        "same_exit": 0.5, "tokens": 4, "answers_alike": 0.5, "left_early": 0.6,
    }  # fmt: skip
