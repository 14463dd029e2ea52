"""The text that a model makes of its own or of given prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCAB, script, tiny
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adaptive import EarlyExitModel, ExitConfig

text = script("train/text")
GIVEN = ["w7 w8", "w9 w10 w11", "w7 w8", "w12"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model that has a tokenizer of one word per id, and a file of three different prompts."""
    folder = tmp_path_factory.mktemp("text")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w5").save_pretrained(folder / "model")
    tiny("llama").save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": given}) + "\n" for given in GIVEN))
    return folder


def config(place, output: str, **changes) -> text.TextConfig:
    sizes = {"train": 2, "select": 3, "certify": 1, "report": 2, "prompt_tokens": 8, "answer_tokens": 5}
    values = {"model": str(place / "model"), "batch_size": 4} | sizes | changes
    return text.TextConfig(str(place / output), **values)


def made(config) -> tuple[dict, dict]:
    """Returns the training rows and the prompts that came out."""
    text.main(config)
    folder = text.Path(config.output)
    return load_file(folder / "train.safetensors"), json.loads((folder / "prompts.json").read_text())


def test_given_prompts_are_answered_in_training_rows_alone(place):
    rows, parts = made(config(place, "given", prompts=str(place / "prompts.jsonl")))
    kept = (rows["labels"] == -100) & (rows["attention_mask"] > 0)
    asked = [ids[keep].tolist() for ids, keep in zip(rows["input_ids"], kept, strict=True)]
    assert asked == [[7, 8], [9, 10, 11]] and ((rows["labels"] >= 0).sum(1) == 5).all()
    assert {name: len(part) for name, part in parts.items()} == {"select": 3, "certify": 1, "report": 2}
    assert not set(GIVEN) & {prompt for part in parts.values() for prompt in part}


def test_none_given_are_the_models_own(place):
    rows, parts = made(config(place, "own"))
    kept = (rows["labels"] == -100) & (rows["attention_mask"] > 0)
    own = {" ".join(f"w{i}" for i in ids[keep]) for ids, keep in zip(rows["input_ids"], kept, strict=True)}
    others = {prompt for part in parts.values() for prompt in part}
    assert len(own) == 2 and len(others) == 6 and not own & others


def test_too_few_given_prompts_are_refused(place):
    with pytest.raises(ValueError, match="has 3 different ones, `train` wants 4"):
        text.main(config(place, "few", train=4, prompts=str(place / "prompts.jsonl")))


def test_a_record_without_the_field_is_still_of_this_configuration(place, capsys):
    old = config(place, "old")
    fields = {name: value for name, value in vars(old).items() if name != "prompts"}
    (place / "old").mkdir()
    (place / "old" / "text.json").write_text(json.dumps(fields))
    text.main(old)
    assert "nothing to do" in capsys.readouterr().out
    assert not text.made_with(place / "old" / "text.json", config(place, "old", prompts="mine.jsonl"))


def test_an_interrupted_run_takes_its_own_batches_and_no_others(place, monkeypatch, capsys):
    given = place / "mine.jsonl"
    given.write_text((place / "prompts.jsonl").read_text())
    first, mine = config(place, "broken", prompts=str(given)), place / "broken" / "parts" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("a user's")

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(text, "as_rows", stopped)
        text.main(first)
    (place / "broken").rename(place / "moved")
    second = replace(first, output=f"{place / 'moved'}/")
    # Other prompts in the same file, then the same ones again, of which nothing is said anew.
    given.write_text('{"text": "w30 w31"}\n{"text": "w9 w10 w11"}\n')
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(text, "write_json", stopped)
        text.main(second)
    edited = load_file(place / "moved" / "train.safetensors")
    fresh, _ = made(config(place, "fresh", prompts=str(given)))
    assert all(np.array_equal(edited[name], fresh[name]) for name in fresh)
    given.write_text((place / "prompts.jsonl").read_text())
    monkeypatch.setattr(text, "sample", stopped)
    rows, _ = made(second)
    assert not np.array_equal(rows["labels"][0], fresh["labels"][0])
    assert (place / "moved" / "parts" / "mine.txt").read_text() == "a user's"
    (place / "moved").rename(place / "again")
    text.main(replace(first, output=str(place / "again")))
    assert "nothing to do" in capsys.readouterr().out


def test_the_model_runs_in_the_type_asked_for(place):
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(place / "half")
    tiny("llama").bfloat16().save_pretrained(place / "half")
    settings = config(place, "x", model=str(place / "half"))
    found = {dtype: text.loaded(replace(settings, dtype=dtype)).dtype for dtype in ("auto", "float32", "bfloat16")}
    auto = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert found == {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}


def test_batches_of_other_weights_or_settings_lie_elsewhere(place):
    tokenizer, settings = AutoTokenizer.from_pretrained(place / "model"), config(place, "x")
    one, other = (EarlyExitModel.from_backbone(tiny("llama", seed), ExitConfig([1], head="norm")) for seed in (0, 1))
    key = text.key_of(one, tokenizer, settings)
    assert key == text.key_of(one, tokenizer, replace(settings, output="y", report=9))
    changed = [replace(settings, **{name: 3}) for name in ("prompt_tokens", "answer_tokens", "temperature", "seed")]
    keys = [text.key_of(one, tokenizer, values) for values in changed] + [text.key_of(other, tokenizer, settings)]
    assert len({key, *keys}) == 6


def test_answers_are_without_the_penalties_that_a_model_ships_with(place):
    folder, answers = place, []
    for penalty in (1.0, 5.0):
        settings = folder / "model" / "generation_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"repetition_penalty": penalty}))
        answers.append(made(config(folder, f"penalty-{penalty}"))[0]["labels"].tolist())
    assert answers[0] == answers[1]
