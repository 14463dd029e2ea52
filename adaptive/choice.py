"""Which thresholds to certify: what a survey and a rehearsal on the selection prompts tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adaptive import calibration, ranking
from adaptive.calibration import BY_TOKEN
from adaptive.outcomes import answer, observe
from adaptive.policy import ExitPolicy
from adaptive.prompts import unpadded
from adaptive.survey import Survey, harm_of_answers, loss_per_prompt

HARMS = (*BY_TOKEN, "sequence")
CAUTION = 0.9  # aim for a bound this far below the risk: a rehearsal is of prompts that have chosen
SURE = 0.9  # and for passing with this probability, over the luck of which prompts were surveyed


@dataclass(frozen=True)
class Aim:
    """What a choice is to pass: at `delta` a bound of `caution` times the risk, with probability `sure`; `most` is the
    largest mean harm per token to consider."""

    delta: float
    most: float
    caution: float = CAUTION
    sure: float = SURE


def choose(
    model, found: Survey, request: Request, n: int, aim: Aim, rehearsed: tuple | None = None
) -> tuple[tuple, dict]:
    """Returns thresholds, and what the survey promises of them.

    For a risk: the cheapest thresholds whose harms, resampled as another survey and then to the size of the
    certification, would pass as the aim says; found by bisection over the mean harm per token.
    The harm of whole answers does not follow from that of tokens, so those are generated, for the selection prompts.
    For a budget: the least harmful thresholds within it.

    Args:
        model: the `EarlyExitModel`.
        found: the survey.
        request: what was asked for.
        n: prompts that will certify.
        aim: of the attempt.
        rehearsed: from `rehearse`: what leaving does beyond the token's own harm.
    """
    tolls, swings = rehearsed or (0.0, np.ones(1))
    own = found.harms(request.harm, request.tolerance)
    arrays, by_token = (found.scores, np.minimum(own + tolls, 1.0), found.costs), request.harm in BY_TOKEN

    def passes(thresholds: np.ndarray) -> bool:
        """Returns whether they would be certified, as far as survey and rehearsal tell."""
        if by_token:
            harms = ranking.predicted(thresholds, found.scores, own, found.costs, found.rows)[0]
            paid = ranking.predicted(thresholds, *arrays, found.rows)[0] - harms
        else:
            asked, policy = unpadded(found.prompts), ExitPolicy(tuple(thresholds))
            answers = answer(model, asked, policy, request.max_new_tokens, request.batch_size, note="choosing")[0]
            harms = harm_of_answers(request.harm, answers, unpadded(found.answers))
            paid = np.zeros(len(harms))
        generator, bounds = np.random.default_rng(request.seed), []
        for _ in range(20):
            other = generator.integers(0, len(harms), len(harms))  # another survey, as it might have been
            drawn = generator.choice(other, n)
            drawn = np.minimum(harms[drawn] + paid[drawn] * generator.choice(swings, n), 1.0)
            bounds.append(calibration.BOUNDS[request.bound](drawn, aim.delta))
        return np.quantile(bounds, aim.sure) <= aim.caution * request.risk

    if request.budget is not None:
        thresholds = ranking.rank_budget(*arrays, found.full_cost, request.budget, found.rows)
    else:
        low, high, thresholds = 0.0, aim.most, np.full(found.scores.shape[1], np.inf)
        for _ in range(8 if by_token else 5):
            middle = (low + high) / 2
            tried = ranking.rank_thresholds(*arrays, found.full_cost, middle, found.rows)
            if passes(tried):
                low, thresholds = middle, tried
            else:
                high = middle
    harms, cost = ranking.predicted(thresholds, *arrays, found.rows)
    promise = {"harm": float(harms.mean()), "relative_flops": cost / found.full_cost, "prompts": len(harms)}
    return tuple(float(t) for t in thresholds), promise


def rehearse(model, found: Survey, request: Request, thresholds: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Returns the toll of leaving at each exit [exits], harm done to later tokens, and how it varies between prompts,
    factors whose mean is 1; both as found in free generation on every second selection prompt.

    Those who left early have handed on K/V that blocks would have made otherwise, and words that the full model would
    not have said: what follows is harmed more often than the survey knows. A token's toll goes with the error of all
    the K/V that it hands on (docs/decisions.md), so the excess is put down to the blocks that were skipped.
    """
    asked, picked = unpadded(found.prompts), np.unique(found.rows)[::2]
    some = [asked[prompt] for prompt in picked]
    outcome = observe(model, some, ExitPolicy(thresholds), request.max_new_tokens, request.batch_size)
    arrays = (found.scores, found.harms(request.harm, request.tolerance), found.costs)
    surveyed = ranking.predicted(np.array(thresholds), *arrays, found.rows)[0][::2]
    excess = loss_per_prompt(request.harm, request.tolerance, outcome, None) - surveyed
    trace = outcome.trace
    skipped = 1 - np.array(trace.exits) / trace.layers
    shares = np.append(skipped, 0.0)[trace.taken].sum(1) / trace.valid.sum(1)  # who ended has -1: the last, 0
    if excess.mean() <= 0 or not shares.any():
        return np.zeros(len(skipped)), np.ones(1)
    swings = np.maximum(excess, 0.0)
    return excess.mean() / shares.mean() * skipped, swings / swings.mean()


@dataclass(frozen=True)
class Request:
    """What `calibrate` was asked for; see there."""

    risk: float | None
    delta: float
    budget: float | None
    harm: str | Callable
    tolerance: float
    bound: str
    max_new_tokens: int
    batch_size: int
    bolder: bool
    seed: int

    def __post_init__(self):
        problems = []
        if isinstance(self.harm, str) and self.harm not in HARMS:
            problems.append(f"`harm`={self.harm!r} is not one of {', '.join(HARMS)}, nor a callable")
        if self.bound not in calibration.BOUNDS:
            problems.append(f"`bound`={self.bound!r} is not one of {', '.join(calibration.BOUNDS)}")
        if self.bolder and self.bound == "crc":
            problems.append("`bolder` with the `bound` 'crc', which controls the mean over draws, not each; take 'wsr'")
        if self.budget is None and (self.risk is None or not 0 < self.risk < 1):
            problems.append(f"`risk`={self.risk!r} is not between 0 and 1")
        if self.budget is not None and self.budget <= 0:
            problems.append(f"`budget`={self.budget!r} is not a share of the full depth's FLOPs, such as 0.8")
        if not 0 <= self.tolerance < np.inf:
            problems.append(f"`tolerance`={self.tolerance!r} is not a number of nats, 0 or more")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 2:
            problems.append(f"`max_new_tokens`={self.max_new_tokens}; 2 or more: a first token comes from the prompt")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            problems.append(f"`batch_size`={self.batch_size}; a whole number of rows, 1 or more")
        if not 0 < self.delta < 1:
            problems.append(f"`delta`={self.delta!r} is not between 0 and 1")
        if problems:
            raise ValueError("calibrate: " + "; ".join(problems))
