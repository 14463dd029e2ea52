"""Rows of a batch that are one row of K/V until they part: every policy must say what it says alone."""

import math

import numpy as np
import pytest
import torch
from conftest import prompts
from test_parity import with_exits
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adaptive.kv import KV
from adaptive.policy import BudgetPolicy, DecayingPolicy, ExitPolicy

NEW = 14


class Stops(StoppingCriteria):
    """Ends each row behind a token that its own history chooses, so that rows end at different times."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 9 == 5) & (input_ids[:, -2] % 2 == 0)


def policies(model, inputs):
    """Policies near each other, twins, those that depend on the past, and such as never meet."""
    probe = generate(model, inputs, probe=True).trace
    half = [float(np.nanquantile(probe.scores[..., exit], 0.5)) for exit in range(model.num_exits)]
    bold = [value * 0.9 for value in half]
    return [
        ExitPolicy.full(model.num_exits),
        ExitPolicy(tuple(half)),
        ExitPolicy(tuple(half)),
        ExitPolicy(tuple(bold)),
        ExitPolicy((*half[:-1], math.inf)),
        ExitPolicy.always(model.num_exits - 1, model.num_exits),
        DecayingPolicy(tuple(half), rate=2.0, length=NEW),
        BudgetPolicy(tuple(half), mean_depth=3.0),
    ]


def generate(model, inputs, **kwargs):
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **settings | kwargs)


@pytest.mark.parametrize("head,kv,depths", [
    ("linear", "own", (1, 3)), ("norm", "own", (2, 4)), ("block", "own", (1, 3)), ("block", "shared", (2, 3))
])  # fmt: skip
@pytest.mark.parametrize("sampled", [False, True])
def test_policies_together_say_what_each_says_alone(head, kv, depths, sampled, monkeypatch):
    model = with_exits("llama", depths=depths, head=head, head_kv=kv, shortlist=80 if 4 in depths else None)
    inputs, rows = prompts(3), 3
    names = policies(model, inputs)
    settings = {"do_sample": sampled, "stopping_criteria": StoppingCriteriaList([Stops()])}
    made, grown = [], []
    monkeypatch.setattr(KV, "__init__", _noting(KV.__init__, made))
    monkeypatch.setattr(KV, "repeat", _noting(KV.repeat, grown))
    together = generate(
        model,
        {name: values.repeat(len(names), 1) for name, values in inputs.items()},
        policy=[policy for policy in names for _ in range(rows)],
        seed=[7 + row for row in range(rows)] * len(names),
        **settings,
    )
    assert all(args[2] == rows for args in made), "a prompt is run once for all policies"
    added = sum(len(args[0]) for args in grown if len(args) == 2)
    assert 0 < added < rows * (len(names) - 1) * (2 if head == "block" and kv == "own" else 1), "twins stay together"
    lengths = set()
    for number, policy in enumerate(names):
        alone = generate(model, inputs, policy=policy, seed=7, **settings)
        part = slice(number * rows, (number + 1) * rows)
        trace, expected = together.trace.part(part), alone.trace
        said = torch.from_numpy(expected.valid)
        ours, theirs = (out.sequences[:, inputs["input_ids"].shape[1] :] for out in (together, alone))
        assert torch.equal(ours[part, : said.shape[1]][said], theirs[said]), policy
        for name in ("taken", "headed", "caught_up", "context", "behind"):
            assert np.array_equal(getattr(trace, name), getattr(expected, name)), (policy, name)
        np.testing.assert_allclose(trace.scores, expected.scores, atol=1e-5)
        for step, logits in enumerate(alone.logits):
            live = torch.from_numpy(expected.valid[:, step])
            torch.testing.assert_close(together.logits[step][part][live], logits[live], atol=1e-4, rtol=1e-4)
        assert model.costs.price(trace).flops.sum() == model.costs.price(expected).flops.sum()
        lengths |= set(expected.valid.sum(1).tolist())
    assert len(lengths) > 2, "rows must end at different times"


def _noting(method, calls):
    def noted(self, *args):
        calls.append(args)
        return method(self, *args)

    return noted


def test_a_prompt_sampled_several_times_is_run_once(monkeypatch):
    model, made = with_exits("llama"), []
    inputs = prompts(2)
    monkeypatch.setattr(KV, "__init__", _noting(KV.__init__, made))
    together = generate(model, inputs, num_return_sequences=3, do_sample=True, seed=1, policy=[0.5, 0.5])
    assert [args[2] for args in made] == [2]
    for row in range(6):
        keep = inputs["attention_mask"][row // 3].bool()
        one = {"input_ids": inputs["input_ids"][row // 3 : row // 3 + 1, keep]}
        alone = generate(model, one, do_sample=True, seed=1 + row, policy=[0.5, 0.5])
        assert torch.equal(alone.sequences[0, -NEW:], together.sequences[row, -NEW:])


def test_policies_that_do_not_fit_the_batch_are_refused():
    model, inputs = with_exits("llama"), prompts(3)
    two = [ExitPolicy((0.5, 0.5))] * 2
    with pytest.raises(ValueError, match="2 policies for 3 rows.*'verify' takes one policy"):
        generate(model, inputs, policy=two, kv="verify")
    with pytest.raises(ValueError, match="has 1 thresholds, the model 2 exits"):
        generate(model, inputs, policy=[ExitPolicy((0.5,))] * 3)


class Parts(LogitsProcessor):
    """Makes four rows say the same, but for the last one at one place."""

    def __call__(self, input_ids, scores):
        said = torch.tensor([5, 5, 5, 7 if input_ids.shape[1] == 11 else 5])
        return torch.full_like(scores, -math.inf).scatter(1, said[:, None], 0.0)


class Ends(StoppingCriteria):
    """Ends the first row at another length than the others."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= torch.tensor([11, 15, 15, 15])


def test_a_row_of_kv_on_which_nobody_rides_keeps_no_others_together():
    model, ids = with_exits("llama"), prompts(2)["input_ids"].repeat_interleave(2, 0)
    full, early = ExitPolicy.full(2), ExitPolicy.always(0, 2)
    settings = {"logits_processor": LogitsProcessorList([Parts()]), "stopping_criteria": StoppingCriteriaList([Ends()])}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = generate(model, inputs, policy=[full, early, full, full], **settings)
    for row in (2, 3):  # the first row has ended where the second first left; these two part one token later
        wanted = model.backbone(out.sequences[row : row + 1, :12]).logits[0, -1]
        torch.testing.assert_close(out.logits[3][row], wanted, atol=1e-4, rtol=1e-4)
