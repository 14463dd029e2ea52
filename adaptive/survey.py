"""What gates say and what leaving does: at every exit and token of the full model's own answers, and per prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adaptive import calibration
from adaptive.calibration import BY_TOKEN
from adaptive.outcomes import Outcome, answer
from adaptive.policy import ExitPolicy
from adaptive.prompts import padded


@dataclass
class Survey:
    """One full-depth pass over the selection prompts, with every gate and head asked at every token.

    Attributes:
        scores, regret: [tokens, exits].
        costs: [tokens, exits + 1], FLOPs of a token leaving there.
        full_cost: mean FLOPs of a token in the plain backbone.
        rows: [tokens], the prompt of each token.
        prompts, answers: ids [prompts, longest], -1 where there is none: what was asked, what the full model said.
    """

    scores: np.ndarray
    regret: np.ndarray
    costs: np.ndarray
    full_cost: float
    rows: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray

    def harms(self, harm: str | Callable, tolerance: float) -> np.ndarray:
        """Returns [tokens, exits] harm in {0, 1} of leaving there; disagreement stands in for harms of whole
        answers."""
        return (self.regret > (tolerance if harm == "regret" else 0.0)).astype(np.float64)


def survey(model, prompts: list[list[int]], max_new_tokens: int, batch_size: int = 32) -> Survey:
    """Returns the survey of these prompts: exactly one full-model pass for each."""
    full = ExitPolicy.full(model.num_exits)
    answers, trace = answer(model, prompts, full, max_new_tokens, batch_size, probe=True, note="surveying")
    valid, costs = trace.valid, model.costs
    # A first token comes out of the prefill, so depth saves nothing there; it is left out of the choice.
    valid[:, 0] = False
    if not valid.any():
        raise ValueError(
            "every answer has one token only, which comes out of the prompt: there is nothing to choose from"
        )
    contexts = trace.context[valid]
    shut = [False] * model.num_exits
    table = {context: (costs.by_exit(context), costs.by_exit(context, shut)[-1]) for context in np.unique(contexts)}
    by_exit = np.stack([table[context][0] for context in contexts])
    plain = float(np.mean([table[context][1] for context in contexts]))
    rows = np.nonzero(valid)[0]
    return Survey(trace.scores[valid], trace.regret[valid], by_exit, plain, rows, padded(prompts), padded(answers))


def loss_per_prompt(harm: str | Callable, tolerance: float, outcome: Outcome, reference: list | None) -> np.ndarray:
    """Returns one number in [0, 1] per prompt: the mean harm of its tokens, or the harm of its whole answer."""
    if harm in BY_TOKEN:
        limit = tolerance if harm == "regret" else 0.0
        harmed = np.where(np.isnan(outcome.regret), np.nan, outcome.regret > limit)
        return np.nanmean(harmed, axis=1)
    return harm_of_answers(harm, outcome.answers, reference)


def harm_of_answers(harm: str | Callable, answers: list[list[int]], reference: list[list[int]]) -> np.ndarray:
    """Returns the harm [prompts] in [0, 1] of whole answers against the full model's own.

    Raises:
        ValueError: the callable gave something outside [0, 1].
    """
    judged = (lambda ours, full: 1 - calibration.rouge_l(ours, full)) if harm == "sequence" else harm
    found = np.array([float(judged(ours, full)) for ours, full in zip(answers, reference, strict=True)])
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"`harm` gave {found.min():.3g} to {found.max():.3g}; it must stay in [0, 1]")
    return found
