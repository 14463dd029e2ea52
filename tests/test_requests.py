"""What callers hand to `generate`: processors and criteria that know their rows, seeds, inputs that go unread."""

import math

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCAB, prompts
from test_parity import generate, with_exits
from test_strategies import agreeing, generous  # noqa: F401
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

OFF = [math.inf, math.inf]


@pytest.fixture(scope="module")
def model():
    """Its exits are often right, and its first gate lets about half of the tokens out at these thresholds."""
    return agreeing("llama")


@pytest.fixture(scope="module")
def short():
    """Shortlists hold the first 32 entries."""
    return with_exits("llama", head="norm", shortlist=32)


class Biased(transformers.LogitsProcessor):
    """Holds a bias for every row."""

    def __init__(self, rows):
        self.bias = 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))

    def __call__(self, input_ids, scores):
        return scores + self.bias


class UpTo(transformers.StoppingCriteria):
    """Holds a length for every row."""

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


class Sure(transformers.StoppingCriteria):
    """Reads the scores of every step so far."""

    def __call__(self, input_ids, scores, **kwargs):
        assert len(scores) == input_ids.shape[1] - 9 and len(scores[0]) == len(input_ids)
        return scores[-1].softmax(-1).amax(-1) > 0.9


def allowed(row, ids):
    return [[5, 6, 7], [20, 21, 22], [40, 41, 42]][row]


PER_ROW = {
    "prefix": {"prefix_allowed_tokens_fn": allowed},
    "encoder penalty": {"encoder_repetition_penalty": 1.5},
    "encoder ngrams": {"encoder_no_repeat_ngram_size": 1},
    "processor": {"logits_processor": transformers.LogitsProcessorList([Biased(3)])},
    "criterion": {"stopping_criteria": [UpTo(11, 14, 17)], "eos_token_id": 1, "pad_token_id": 9},
    "scores": {"stopping_criteria": [Sure()], "output_scores": True, "eos_token_id": 1, "pad_token_id": 9},
}


@pytest.mark.parametrize("name", PER_ROW)
def test_what_knows_its_rows_is_verified_as_at_full_depth(name, model, generous):  # noqa: F811
    model, thresholds = model
    settings = dict(do_sample=False, max_new_tokens=12, return_dict_in_generate=True) | PER_ROW[name]
    expected = model.backbone.generate(**prompts(3), **settings).sequences
    out = generate(model, prompts(3), kv="verify", policy=thresholds, **settings)
    assert torch.equal(out.sequences, expected) and out.trace.drafted.any()
    assert name != "scores" or len({*map(tuple, out.trace.valid.tolist())}) > 1, "some row is sure of itself"


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 2.0},
        {"watermarking_config": transformers.SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])},
    ],
    ids=["guidance", "synthid"],
)
def test_processors_that_remember_are_refused_where_drafts_are_verified(settings, model):
    model, _ = model
    with pytest.raises(ValueError, match="kv='verify' does not go with guidance_scale or SynthID"):
        generate(model, prompts(1), kv="verify", policy=[0.5, 0.5], **settings)
    expected = model.backbone.generate(**prompts(2), max_new_tokens=6, do_sample=False, **settings)
    assert torch.equal(generate(model, prompts(2), policy=OFF, max_new_tokens=6, **settings).sequences, expected)


def test_processors_that_remember_are_asked_once_a_token_beside_a_shortlist(short):
    """Everything on the list is forbidden, so that every token needs the whole vocabulary."""
    settings = {"guidance_scale": 4.0, "suppress_tokens": list(range(60)), "policy": [0.0, math.inf]}
    whole = with_exits("llama", head="norm")
    said = [generate(model, prompts(2), max_new_tokens=12, **settings).sequences for model in (short, whole)]
    assert torch.equal(*said) and (said[0][:, 9:] >= 60).all()


@pytest.mark.parametrize("kv", ["propagate", "verify"])
@pytest.mark.parametrize("names", [["renormalize_logits"], ["remove_invalid_values"],
                                   ["renormalize_logits", "remove_invalid_values"]], ids="+".join)  # fmt: skip
def test_an_empty_shortlist_is_seen_through_what_tidies_up_scores(names, kv, short, generous, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(f"adaptive.{'decoding' if kv == 'propagate' else 'verify'}.widened", spy(asked))
    settings = dict.fromkeys(names, True) | {"min_new_tokens": 5, "eos_token_id": list(range(60)), "kv": kv}
    out = generate(short, prompts(1), policy=[0.0, math.inf], max_new_tokens=5, **settings)
    assert len(asked) >= 3 and (out.sequences[:, 9:] >= 60).all()


def spy(asked):
    from adaptive.exits import widened

    return lambda *args: asked.append(args) or widened(*args)


def test_seeds_may_be_arrays(model):
    def sampled(seed):
        return generate(model[0], prompts(2), seed=seed, policy=OFF, do_sample=True, max_new_tokens=4).sequences

    several, one = sampled([4, 9]), sampled(4)
    for seed in (np.array([4, 9]), torch.tensor([4, 9]), [np.int64(4), np.int32(9)]):
        assert torch.equal(sampled(seed), several)
    for seed in (np.int64(4), np.uint8(4), torch.tensor(4)):
        assert torch.equal(sampled(seed), one)
    for seed in (1.5, [4, 0.5], np.array([0.5, 1.0])):
        with pytest.raises(ValueError, match="whole number"):
            sampled(seed)


@pytest.mark.parametrize("kv", ["propagate", "verify"])
def test_a_row_that_ended_is_padded_without_an_eos(kv, model):
    settings = {"stopping_criteria": [UpTo(11, 15)], "pad_token_id": 9, "policy": [0.5, 0.5], "kv": kv}
    out = generate(model[0], prompts(2), **settings).sequences
    assert out.shape[1] == 15 and (out[0, 11:] == 9).all()


def test_what_would_be_ignored_is_refused_by_name():
    model, inputs = with_exits("gpt2"), prompts(2)
    embeddings = model.backbone.get_input_embeddings()(inputs["input_ids"])
    for given in ({"inputs_embeds": embeddings}, {"inputs_embeds": embeddings} | inputs):
        with pytest.raises(ValueError, match="embeddings are not supported; give the prompt as input_ids"):
            generate(model, given)
    with pytest.raises(ValueError, match="token_type_ids: the exits see text only"):
        generate(model, inputs | {"token_type_ids": torch.ones_like(inputs["input_ids"])})
    own = torch.arange(9).expand(2, -1)
    for positions in (own + 30, own, own[:, :4]):
        with pytest.raises(ValueError, match="position_ids are not those of the attention_mask"):
            generate(model, inputs | {"position_ids": positions})
    expected = generate(model, inputs).sequences
    counted = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    assert torch.equal(generate(model, inputs | {"position_ids": counted}, use_cache=True).sequences, expected)
    even = {"input_ids": inputs["input_ids"][:1].repeat(3, 1)}
    out = generate(model, even, position_ids=own[:1], num_return_sequences=2, do_sample=True)
    assert out.sequences.shape == (6, 21)


def test_gradient_checkpointing_in_training_mode_is_refused():
    model = with_exits("llama")
    model.train_mode("full")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        generate(model.train(), prompts(1))
    generate(model.eval(), prompts(1))


@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
def test_strings_stop_each_row(model, kv, monkeypatch):
    model, thresholds = model
    letters = "abcdef" + "".join(chr(0x4E00 + index) for index in range(VOCAB - 6))
    inner = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="a"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    settings = dict(**prompts(3), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=1)
    free = model.backbone.generate(**settings)[:, -12:]
    stops = [tokenizer.decode(free[0, 2:4]), tokenizer.decode(free[1, 5:6])]
    settings |= {"stop_strings": stops, "tokenizer": tokenizer}
    wanted = model.backbone.generate(**settings)
    assert not torch.equal(wanted[:, -12:], free)
    assert torch.equal(model.generate(**settings, kv=kv, policy=thresholds if kv == "verify" else OFF), wanted)
    config = transformers.GenerationConfig(stop_strings=stops, max_new_tokens=12, eos_token_id=1)
    policy = thresholds if kv == "verify" else OFF
    given = dict(**prompts(3), pad_token_id=0, do_sample=False, tokenizer=tokenizer, kv=kv, policy=policy)
    assert torch.equal(model.generate(**given, generation_config=config), wanted)
    assert config.stop_strings == stops
    own = model.generation_config
    monkeypatch.setattr(own, "stop_strings", stops)
    assert torch.equal(model.generate(**given, max_new_tokens=12, eos_token_id=1), wanted)


@pytest.mark.parametrize("kv", ["propagate", "recompute", "verify"])
def test_a_row_that_ended_says_0_without_a_padding_token(kv):
    model = with_exits("llama")
    model.generation_config.pad_token_id = None
    stop = transformers.StoppingCriteriaList([UpTo(11, 16, 16, 16)])
    out = generate(model, prompts(4), policy=[0.5, 0.5], kv=kv, stopping_criteria=stop, max_new_tokens=7)
    assert (out.sequences[0, 11:] == 0).all() and (out.sequences[1:, 11:] != 0).any()
