"""Calibration on a model: harm is what the full model says, certificates hold what they promise, too few refuse."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import VOCAB

from adaptive import EarlyExitModel, ExitConfig, calibrate, calibration, certify, choice, losses, outcomes, survey
from adaptive.policy import ExitPolicy

NEW = 8


class Tokenizer:
    chat_template = None

    def encode(self, text):
        return [ord(c) % VOCAB for c in text]


def questions(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (5 + i % 4,), generator=generator).tolist() for i in range(count)]


@pytest.fixture
def model(llama):
    """Exits that are often right: the last block hardly changes the state."""
    with torch.no_grad():
        for layer in llama.model.layers[2:]:
            layer.mlp.down_proj.weight.mul_(0.4)
            layer.self_attn.o_proj.weight.mul_(0.4)
    return EarlyExitModel.from_backbone(llama, ExitConfig(depths=[2, 3], gate="margin", head="norm"))


def test_harm_is_judged_by_the_full_model_on_the_same_prefix(model):
    asked = questions(5)
    outcome = outcomes.observe(model, asked, ExitPolicy((0.02, 0.02)), NEW, batch_size=2)
    assert len(set(outcome.trace.taken.flatten().tolist())) > 1
    for row, (prompt, answer) in enumerate(zip(asked, outcome.answers, strict=True)):
        logits = model.backbone(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = losses.regret(logits, torch.tensor(answer))
        assert np.allclose(outcome.regret[row], expected.detach(), atol=1e-3)
        nll = -logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert np.allclose(outcome.nll[row], nll.detach(), atol=1e-3)
    assert (outcome.regret > 0.25).any()


def test_survey_says_what_leaving_would_do(model):
    """At every exit the surveyed regret of a policy that leaves there first is what judging finds."""
    asked = questions(6)
    found = survey.survey(model, asked, NEW)
    assert found.scores.shape == found.regret.shape == (6 * (NEW - 1), 2) and found.costs.shape == (6 * (NEW - 1), 3)
    full = outcomes.observe(model, asked, ExitPolicy.full(2), NEW)
    assert np.nanmax(full.regret) < 1e-4 and found.full_cost < found.costs[:, 2].mean()
    one = outcomes.observe(model, asked, ExitPolicy.always(0, 2), 2)
    first = survey.survey(model, asked, 2)
    same = [
        row
        for row in range(6)
        if one.answers[row][0] == outcomes.answer(model, asked, ExitPolicy.full(2), 1)[0][row][0]
    ]
    assert same
    assert np.allclose(one.regret[same, 1], first.regret[same, 0], atol=1e-3)


@pytest.mark.parametrize(
    "harm,risk", [("regret", 0.1), ("disagreement", 0.1), ("sequence", 0.2), (lambda ours, full: ours != full, 0.5)]
)
def test_a_certificate_holds_on_new_prompts(model, harm, risk):
    certificate = calibrate(
        model, questions(120), risk=risk, delta=0.2, harm=harm, tokenizer=Tokenizer(), max_new_tokens=NEW
    )
    assert certificate.mean <= certificate.certified <= risk and certificate.n == 90
    assert model.policy.thresholds == tuple(certificate.thresholds)
    fresh = questions(60, seed=9)
    outcome = outcomes.observe(model, fresh, model.policy, NEW)
    reference = outcomes.answer(model, fresh, ExitPolicy.full(2), NEW)[0]
    assert survey.loss_per_prompt(harm, 0.25, outcome, reference).mean() <= risk
    if harm == "regret":
        assert outcome.trace.mean_depth < 4, "a certificate for never leaving is no feat"


def test_a_budget_is_kept_and_its_risk_certified(model):
    with pytest.raises(ValueError, match="at least"):
        calibrate(model, questions(40), budget=0.01, tokenizer=Tokenizer(), max_new_tokens=NEW)
    certificate = calibrate(model, questions(60), budget=1.0, tokenizer=Tokenizer(), max_new_tokens=NEW)
    assert certificate.kind == "budget" and certificate.epsilon is None
    assert certificate.mean <= certificate.certified <= 1 and certificate.predicted["relative_flops"] <= 1.0


def test_too_few_prompts_are_refused_with_the_number_needed(model):
    with pytest.raises(ValueError, match="75 different prompts.*at least 167 must.*223 or more"):
        calibrate(model, questions(100), risk=0.02, tokenizer=Tokenizer())


def test_impossible_requests_are_named_at_once(model):
    with pytest.raises(ValueError, match="(?s)harm.*bound.*risk.*delta"):
        calibrate(model, questions(10), risk=2.0, delta=0, harm="nothing", bound="none", tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="(?s)tolerance.*max_new_tokens.*batch_size"):
        wrong = {"tolerance": float("nan"), "max_new_tokens": 2.5, "batch_size": 0}
        calibrate(model, questions(10), **wrong, tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="`bolder` with the `bound` 'crc'"):
        calibrate(model, questions(10), bolder=True, bound="crc", tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="tolerence"):
        calibrate(model, questions(10), tolerence=1, tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="no prompts"):
        calibrate(model, [], tokenizer=Tokenizer())


def test_exits_that_harm_are_refused_rather_than_certified(model, monkeypatch):
    """A selection that flatters the exits: rehearsal, and without it certification, sees what they really do."""
    asked = questions(80)
    found = survey.survey(model, questions(20, seed=5), NEW)
    found.regret[:] = 0
    monkeypatch.setattr(certify, "rehearse", lambda *args: (np.zeros(2), np.ones(1)))
    with pytest.raises(certify.Refused, match="no policy was certified.*mean harm 0"):
        calibrate(model, asked, risk=0.1, delta=0.2, tokenizer=Tokenizer(), max_new_tokens=NEW, selection=found)
    assert model.policy == ExitPolicy.full(2) and model.certificate is None
    monkeypatch.undo()
    rehearsed = calibrate(model, asked, risk=0.1, delta=0.2, tokenizer=Tokenizer(), max_new_tokens=NEW, selection=found)
    assert rehearsed.predicted["harm"] > 0, "the toll is in what is promised, or nothing opens"


def test_the_toll_that_a_rehearsal_finds_is_allowed_for(model, monkeypatch):
    asked, settings = questions(80), dict(risk=0.1, delta=0.2, tokenizer=Tokenizer(), max_new_tokens=NEW)
    found, paid, rehearsed = survey.survey(model, questions(40, seed=5), NEW), [], []
    for toll, swings in ((0.0, [1.0]), (0.04, [1.0]), (0.04, [0.0] * 9 + [10.0])):
        tolls = np.array([toll, toll / 2]), np.array(swings)
        monkeypatch.setattr(certify, "rehearse", lambda *args, tolls=tolls: rehearsed.append(args[-1]) or tolls)
        paid.append(calibrate(model, asked, selection=found, **settings).predicted["relative_flops"])
    assert len(rehearsed) == 3 and rehearsed[0] == rehearsed[1], "the first choice, before anything is known"
    assert paid[0] + 0.005 < paid[1] < paid[2], "a toll opens exits less, one that falls on few prompts even less"


def test_bolder_choices_follow_a_pass_and_vouch_for_the_risk_only(model, monkeypatch):
    asked, settings = questions(120), dict(risk=0.1, delta=0.2, tokenizer=Tokenizer(), max_new_tokens=NEW)
    found = survey.survey(model, questions(40, seed=5), NEW)
    plain = calibrate(model, asked, selection=found, **settings)
    bolder = calibrate(model, asked, selection=found, bolder=True, **settings)
    assert bolder.certified == 0.1 > plain.certified and bolder.mean < 0.1
    assert bolder.saved > plain.saved + 0.005 and model.policy.thresholds == tuple(bolder.thresholds)
    tested, seen = certify._tested, []

    def only_the_first(*args):
        seen.append(tested(*args))
        return seen[-1] if len(seen) == 1 else (False, certify.replace(seen[-1][1], certified=0.11))

    monkeypatch.setattr(certify, "_tested", only_the_first)
    refused = calibrate(model, asked, selection=found, bolder=True, **settings)
    assert refused == certify.replace(seen[0][1], certified=0.1) and len(seen) == 2


@pytest.mark.parametrize("first", [0.201, 0.02])
def test_a_sequence_of_attempts_errs_no_more_often_than_delta(monkeypatch, first):
    """The worst case: every choice, or every one but the first, harms a hair above the risk, each on its own. A first
    choice's own bound would be one more chance to be wrong."""
    random, risk, delta = np.random.default_rng(0), 0.2, 0.3
    monkeypatch.setattr(certify, "BOLDER", ((1.0, 0.5),) * 8)
    request = choice.Request(risk, delta, None, "regret", 0.25, "hb", NEW, 32, True, 0)
    template = dict.fromkeys(field.name for field in dataclasses.fields(certify.Certificate))
    monkeypatch.setattr(certify, "_rehearsed", lambda *args, **kwargs: (((float(next(chosen)),), {}), None))

    def tested(model, prompts, request, reference, delta, thresholds, promise):
        harm = first if not thresholds[0] else risk + 0.001
        bound = calibration.hoeffding_bentkus_bound(random.binomial(1, harm, len(prompts)), delta)
        rest = {"certified": bound, "mean": harm, "n": len(prompts), "predicted": {"harm": risk}}
        return bound <= risk, certify.Certificate(**template | rest | {"thresholds": list(thresholds)})

    monkeypatch.setattr(certify, "_tested", tested)
    wrong = 0
    for _ in range(300):
        chosen = iter(range(20))
        try:
            found = certify._attempt(None, None, [[0]] * 100, request)
            wrong += found.mean > found.certified
        except certify.Refused:
            pass
    assert 10 < wrong <= delta * 300


def test_a_rehearsal_is_of_the_selection_prompts(model):
    found, thresholds = survey.survey(model, questions(12, seed=5), NEW), (0.02, 0.02)
    found.regret[:, 0] = 0  # as if leaving at the first exit had harmed nobody when surveyed
    request = choice.Request(0.1, 0.2, None, "regret", 0.25, "wsr", NEW, 32, False, 0)
    tolls, swings = choice.rehearse(model, found, request, thresholds)
    picked = np.unique(found.rows)[::2]
    outcome = outcomes.observe(model, [questions(12, seed=5)[i] for i in picked], ExitPolicy(thresholds), NEW)
    free = survey.loss_per_prompt("regret", 0.25, outcome, None)
    leaves = found.scores >= 0.02
    harms = found.harms("regret", 0.25)[np.arange(len(leaves)), np.minimum(leaves.argmax(1), 1)] * leaves.any(1)
    surveyed = np.array([harms[found.rows == prompt].mean() for prompt in picked])
    skipped = [(1 - outcome.trace.depth[row][outcome.trace.valid[row]] / 4).mean() for row in range(len(picked))]
    assert tolls[0] == pytest.approx(2 * tolls[1]) and tolls[1] > 0, "two blocks skipped, and one"
    assert tolls[0] == pytest.approx((free - surveyed).mean() / np.mean(skipped) / 2)
    assert swings == pytest.approx(np.maximum(free - surveyed, 0) / np.maximum(free - surveyed, 0).mean())
    assert swings.min() == 0, "a toll is not paid back"


def test_a_certificate_of_other_weights_warns_loudly(model, tmp_path, caplog):
    model.backbone.save_pretrained(tmp_path / "backbone")
    model = EarlyExitModel.from_backbone(str(tmp_path / "backbone"), model.exit_config)
    certificate = calibrate(model, questions(60), budget=1.0, tokenizer=Tokenizer(), max_new_tokens=NEW)
    model.save_pretrained(tmp_path / "saved")
    again = EarlyExitModel.from_pretrained(tmp_path / "saved")
    assert again.certificate == certificate and "certificate" not in caplog.text
    assert again.policy.thresholds == tuple(certificate.thresholds)
    EarlyExitModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert "calibrate this model" in caplog.text


def test_repeated_and_shared_prompts_are_no_evidence(model):
    asked = questions(60)
    with pytest.raises(ValueError, match="3 different prompts"):
        calibrate(model, asked[:4] * 100, risk=0.1, tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="5 prompts would both choose and certify"):
        calibrate(model, asked, budget=1.0, selection=asked[:5], tokenizer=Tokenizer())


def test_penalties_of_the_generation_config_do_not_count_as_harm(model):
    model.generation_config.repetition_penalty = 1.5
    outcome = outcomes.observe(model, questions(4), ExitPolicy.full(2), NEW)
    assert np.nanmax(outcome.regret) < 1e-4


def test_ids_may_be_arrays_and_loose_numbers_are_refused(model):
    settings = dict(risk=0.9, delta=0.5, max_new_tokens=2, batch_size=8)
    asked = [np.array(prompt) for prompt in questions(40)]
    assert calibrate(model, asked, **settings) == calibrate(model, questions(40), **settings)
    with pytest.raises(ValueError, match="a prompt is a string"):
        calibrate(model, [1, 2, 3], **settings)
