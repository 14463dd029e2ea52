"""Scoring through the exits: the same as decoding, the same as the parts alone, and a distribution whatever it is."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny

from adaptive.config import ExitConfig
from adaptive.descent import FLOOR, Row, log_probabilities
from adaptive.model import EarlyExitModel
from adaptive.policy import BudgetPolicy, DecayingPolicy, ExitPolicy
from adaptive.scoring import probe, score
from adaptive.tally import oracle

NEW = 10


def with_exits(family="llama", depths=(1, 3), seed=0, **config):
    """A tiny model whose exits have random gates and adapters, so that tokens leave at different depths."""
    model = EarlyExitModel.from_backbone(tiny(family, seed), ExitConfig(depths=list(depths), **config))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.exits.named_parameters():
            if parameter.dim() >= 2 and ("gates" in name or "up" in name or "down" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for buffer in model.exits.fills.buffers():
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def texts(count=5, seed=0, stems=6):
    """Random rows of different lengths, some without a stem and some with alternatives."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    return [Row(draw(3 + 2 * i), draw((2 * i + 1) % stems), draw(1 + i % 3)) for i in range(count)]


def middle(model, rows):
    """Thresholds that let about half of the tokens out at each exit."""
    scores = probe(model, rows).scores
    found = [np.sort(column[~np.isnan(column)]) for column in np.moveaxis(scores, -1, 0)]
    return ExitPolicy(tuple(float(line[len(line) // 2 - 1 : len(line) // 2 + 1].mean()) for line in found))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "config",
    [{}, {"head": "block"}, {"head": "block", "head_kv": "shared"}, {"gate": "max_prob"}, {"gate": "similarity"}],
    ids=["linear", "own", "shared", "max_prob", "similarity"],
)
@pytest.mark.parametrize("kind", [ExitPolicy, partial(DecayingPolicy, length=NEW)], ids=["fixed", "decaying"])
def test_what_decoding_said_is_scored_as_decoding_said_it(family, config, kind):
    model = with_exits(family, **config)
    prompt = torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(3))
    settings = dict(do_sample=True, seed=1, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
    scores = model.generate(input_ids=prompt, probe=True, **settings).trace.scores[0]
    # Between two scores: rounding must not decide.
    policy = kind(tuple(np.sort(scores, axis=0)[NEW // 2 - 1 : NEW // 2 + 1].mean(0)))
    out = model.generate(input_ids=prompt, policy=policy, **settings)
    assert len(set(out.trace.taken[0].tolist())) > 1, "one depth only proves little"
    said = out.sequences[0, 7:].tolist()
    rows = [Row(prompt[0].tolist(), said[:-1], said[-1:]), *texts(3)]
    other = ExitPolicy(tuple(reversed(policy.thresholds)))
    (got, *_) = score(model, rows, [policy, other, ExitPolicy.full(2)])
    logprobs = torch.stack(out.logits)[:, 0].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(said)[:, None])[:, 0].double()
    assert got.stem[0] == pytest.approx(float(expected[:-1].sum()), rel=1e-4)
    assert got.last[0][0] == pytest.approx(float(expected[-1]), rel=1e-4)
    assert got.said[0, :NEW].tolist() == logprobs.argmax(-1).tolist()
    trace, mine = out.trace, got.trace
    for name in ("taken", "context", "headed", "caught_up"):
        assert (getattr(mine, name)[0, :NEW] == getattr(trace, name)[0]).all(), name
    assert np.allclose(mine.scores[0, :NEW], trace.scores[0], atol=1e-4, equal_nan=True)


def test_an_exit_at_full_depth_leaves_nothing_to_fill():
    model, rows = with_exits(depths=(2, 4), shortlist=40), texts()
    policy = middle(model, rows)
    (got,) = score(model, rows, [policy])
    assert {0, 1, 2} <= set(got.trace.taken.flatten().tolist())


def test_full_is_the_backbone_and_policies_do_not_disturb_each_other():
    model, rows = with_exits(), texts()
    policy = middle(model, rows)
    policies = [ExitPolicy.full(2), policy, ExitPolicy.always(0, 2), ExitPolicy((math.inf, policy.thresholds[1]))]
    together = score(model, rows, policies)
    for got, one in zip(together, policies):
        alone = score(model, rows, [one])[0]
        assert np.allclose(got.stem, alone.stem, atol=1e-6) and (got.trace.taken == alone.trace.taken).all()
        assert (got.said[got.trace.valid] == alone.said[got.trace.valid]).all()
    assert not np.allclose(together[0].stem, together[1].stem), "the policies must differ"
    for index, row in enumerate(rows):
        ids = torch.tensor([[*row.context, *row.stem]])
        with torch.no_grad():
            logprobs = model.backbone(ids).logits[0, len(row.context) - 1 :].log_softmax(-1)
        stem = sum(float(line[token]) for line, token in zip(logprobs, row.stem))
        assert together[0].stem[index] == pytest.approx(stem, abs=1e-5)
        assert together[0].last[index] == pytest.approx(logprobs[-1, list(row.last)].numpy(), abs=1e-5)
        greedy = logprobs.argmax(-1).tolist()
        assert together[0].is_said(index, row) == [greedy == [*row.stem, token] for token in row.last]


@pytest.mark.parametrize("config", [{}, {"head": "block"}, {"head": "block", "head_kv": "shared"}])
def test_choices_of_one_question_read_it_once(config, monkeypatch):
    model, rows = with_exits(**config), texts(4)
    rows = [row._replace(context=rows[index // 2].context) for index, row in enumerate(rows)]
    policy = middle(model, rows)
    apart = [score(model, [row], [policy])[0] for row in rows]
    begun = []
    start = model.view.start
    monkeypatch.setattr(model.view, "start", lambda ids, *args: begun.append(tuple(ids.shape)) or start(ids, *args))
    together = score(model, rows, [policy])[0]
    assert begun[0] == (2, len(rows[3].context)) and begun[1][0] == 4
    for index, one in enumerate(apart):
        assert together.stem[index] == pytest.approx(one.stem[0], abs=1e-5)
        assert (together.trace.taken[index][: len(rows[index].stem) + 1] == one.trace.taken[0]).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_batches_of_any_size_score_the_same(family):
    model, rows = with_exits(family), texts(16)
    policies = [middle(model, rows), ExitPolicy.full(2)]
    whole = score(model, rows, policies)
    for size in (1, 4):
        parts = [score(model, rows[start : start + size], policies) for start in range(0, 16, size)]
        for number in range(2):
            assert np.concatenate([part[number].stem for part in parts]) == pytest.approx(whole[number].stem, rel=1e-6)


@pytest.mark.parametrize("screen", [None, 8])
def test_a_shortlist_scores_a_distribution_over_the_whole_vocabulary(screen):
    model = with_exits(depths=(2, 4), shortlist=20, screen=screen)
    model.exits.choose_shortlists(torch.zeros(VOCAB).index_fill(0, torch.arange(40, 60), 1.0))
    rows = [Row([5, 9, 11], [45], list(range(VOCAB))), Row([7], [], list(range(VOCAB)))]
    for policy in (ExitPolicy.always(0, 2), ExitPolicy.always(1, 2), ExitPolicy.full(2)):
        got = score(model, rows, [policy])[0]
        for row, place in ((0, 1), (1, 0)):
            shares = np.exp(got.last[row])
            assert shares.sum() == pytest.approx(1, abs=1e-5)
            if policy != ExitPolicy.full(2):
                assert np.sort(shares)[-20:].sum() == pytest.approx(1 - FLOOR, abs=1e-5)
                assert got.unlisted[row, place] == VOCAB - 20
                assert shares[got.said[row, place]] == shares.max()
                assert screen or 40 <= got.said[row, place] < 60


def test_a_budget_is_refused():
    with pytest.raises(ValueError, match="token after token"):
        score(with_exits(), texts(1), [BudgetPolicy((0.5, 0.5), mean_depth=2)])


def test_candidates_of_each_row_are_looked_up_in_that_row():
    logits, ids = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[3, 7], [7, 8]])
    got, unlisted = log_probabilities(logits, ids, torch.tensor([[7, 8], [7, -1]]), 10)
    expected = logits.log_softmax(-1) + math.log1p(-FLOOR)
    assert got[0].tolist() == pytest.approx([float(expected[0, 1]), math.log(FLOOR / 8)])
    assert got[1].tolist() == pytest.approx([float(expected[1, 0]), 0.0])
    assert unlisted.tolist() == [1, 0]


def test_the_oracle_is_the_first_exit_that_agrees():
    model, rows = with_exits(), texts(8, stems=12)
    trace = probe(model, rows)
    full, first, second = score(model, rows, [ExitPolicy.full(2), ExitPolicy.always(0, 2), ExitPolicy.always(1, 2)])
    agrees = [(one.said == full.said) for one in (first, second)]
    # Exit 1 is taken here after no token left at exit 0, so its states are the full model's in the first column only.
    taken = oracle(trace).taken
    assert (taken[:, 0] == np.where(agrees[0], 0, np.where(agrees[1], 1, 2))[:, 0]).all()
    assert (taken[~trace.valid] == -1).all() and len(set(taken[trace.valid].tolist())) > 1
    assert oracle(trace).mean_depth <= trace.mean_depth


def test_similarity_behind_a_closed_exit_is_scored_as_it_is_decoded():
    model = with_exits("llama", gate="similarity")
    prompt = torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(3))
    policy = ExitPolicy((math.inf, 2.0))
    out = model.generate(
        input_ids=prompt, policy=policy, do_sample=False, max_new_tokens=10, return_dict_in_generate=True
    )
    said = out.sequences[0, 7:].tolist()
    rows = [Row(prompt[0].tolist(), said[:-1], said[-1:])]
    scored = score(model, rows, [policy, ExitPolicy((0.5, 0.5))])[0].trace.scores[0, :10, 1]
    assert scored == pytest.approx(out.trace.scores[0, :, 1], abs=1e-4)
