"""Calibration on a model: survey at full depth, choose thresholds, rehearse them, certify them in free generation.

The prompts that choose and the prompts that certify are disjoint. Harm is judged per generated token by the full
model on the same prefix, and averaged per prompt: prompts are what is exchangeable, tokens of one answer are not.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive import calibration, ranking
from adaptive.calibration import BY_TOKEN, Certificate
from adaptive.data import digest
from adaptive.outcomes import Outcome, answer, observe
from adaptive.policy import ExitPolicy
from adaptive.prompts import Prompt, distinct, encode, unpadded
from adaptive.storage import model_digest
from adaptive.survey import Survey, harm_of_answers, loss_per_prompt, survey

logger = logging.getLogger(__name__)
HARMS = (*BY_TOKEN, "sequence")
CAUTION = 0.9  # aim for a bound this far below the risk: a rehearsal is of prompts that have chosen
SURE = 0.9  # and for passing with this probability, over the luck of which prompts were surveyed
RETREAT = 0.7  # the second attempt allows this share of the harm that the first one was promised


class Refused(ValueError):
    """No certificate: too few prompts, or no policy that meets the risk."""


def choose(
    model, found: Survey, request: Request, n: int, delta: float, most: float, rehearsed: tuple | None = None
) -> tuple[tuple, dict]:
    """Returns thresholds, and what the survey promises of them.

    For a risk: the cheapest thresholds whose harms, resampled as another survey and then to the size of the
    certification, would be certified with `CAUTION` to spare `SURE`ly; found by bisection over the mean harm per token.
    The harm of whole answers does not follow from that of tokens, so those are generated, for the selection prompts.
    For a budget: the least harmful thresholds within it.

    Args:
        model: the `EarlyExitModel`.
        found: the survey.
        request: what was asked for.
        n: prompts that will certify.
        delta: of the attempt.
        most: largest mean harm per token to consider.
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
            bounds.append(calibration.BOUNDS[request.bound](drawn, delta))
        return np.quantile(bounds, SURE) <= CAUTION * request.risk

    if request.budget is not None:
        thresholds = ranking.rank_budget(*arrays, found.full_cost, request.budget, found.rows)
    else:
        low, high, thresholds = 0.0, most, np.full(found.scores.shape[1], np.inf)
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
    seed: int

    def __post_init__(self):
        problems = []
        if isinstance(self.harm, str) and self.harm not in HARMS:
            problems.append(f"`harm`={self.harm!r} is not one of {', '.join(HARMS)}, nor a callable")
        if self.bound not in calibration.BOUNDS:
            problems.append(f"`bound`={self.bound!r} is not one of {', '.join(calibration.BOUNDS)}")
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


def calibrate(
    model,
    prompts: Sequence[Prompt],
    risk: float | None = 0.02,
    delta: float = 0.05,
    *,
    selection: Survey | Sequence[Prompt] | None = None,
    tokenizer=None,
    **settings,
) -> Certificate:
    """Returns a certificate, and gives its thresholds to the model as its policy.

    With probability at least 1 - delta over the draw of the certification prompts, the expected harm of a prompt like
    them, different ones counting once each, is at most `certificate.certified`; that is at most `risk` if a risk was
    asked for.

    Args:
        model: the `EarlyExitModel`.
        prompts: what the model will be asked: strings, chat messages or token ids. Without `selection`, a quarter of
            them choose thresholds and the others certify; a prompt never does both.
        risk: largest expected harm per token (epsilon). Ignored when `budget` is given.
        delta: probability with which the certificate may be wrong.
        selection: prompts to choose thresholds on, or a `Survey` of them; all `prompts` then certify.
        tokenizer: of the backbone; loaded from its folder if None.
        **settings:
            budget: FLOPs per token relative to full depth; the thresholds of least harm within it are certified.
            harm: "regret" (default: the full model gives the chosen token over `tolerance` nats less than its
                best), "disagreement" (another token than its best), "sequence" (1 - ROUGE-L against its own answer),
                or a callable of (answer ids, the full model's answer ids) with values in [0, 1].
            tolerance: of regret, 0.25 nats.
            bound: "wsr" (default), "hb" or "crc" (which controls the mean only); see `calibration`.
            max_new_tokens: length, 64, up to which answers are generated and vouched for.
            batch_size: rows generated at once, 32.
            seed: of the split and of the bound's order, 0.

    Raises:
        ValueError: too few prompts (with the number needed), a setting that is not allowed, a risk that no policy met.
    """
    defaults = {"budget": None, "harm": "regret", "tolerance": 0.25, "bound": "wsr", "max_new_tokens": 64,
                "batch_size": 32, "seed": 0}  # fmt: skip
    if unknown := settings.keys() - defaults.keys():
        raise ValueError(f"calibrate: {sorted(unknown)} are no settings; there are {sorted(defaults)}")
    request = Request(risk=risk, delta=delta, **defaults | settings)
    choosing, certifying = _divide(model, prompts, selection, tokenizer, request)
    if not isinstance(selection, Survey):
        selection = survey(model, choosing, request.max_new_tokens, request.batch_size)
    certificate = _attempt(model, selection, certifying, request)
    model.certify(certificate)
    return certificate


def _divide(model, prompts, selection, tokenizer, request: Request) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the prompts, as ids, that choose and those that certify; all different."""
    asked = list(prompts) + ([] if selection is None or isinstance(selection, Survey) else list(selection))
    if tokenizer is None and any(
        isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)) for prompt in asked
    ):
        tokenizer = load_tokenizer(model)
    encoded = distinct(encode(prompts, tokenizer))
    order = np.random.default_rng(request.seed).permutation(len(encoded))
    cut = 0 if selection is not None else len(encoded) // 4
    certifying, choosing = [encoded[i] for i in order[cut:]], [encoded[i] for i in order[:cut]]
    if selection is not None:
        given = isinstance(selection, Survey)
        choosing = unpadded(selection.prompts) if given else distinct(encode(selection, tokenizer))
    if both := len({tuple(p) for p in choosing} & {tuple(p) for p in certifying}):
        raise ValueError(f"calibrate: {both} prompts would both choose and certify; leave them out of one")
    if request.budget is None:
        _require_enough(len(certifying), selection is None, request)
    if not choosing:
        raise ValueError(f"calibrate: {len(encoded)} prompts leave none to choose thresholds on; give at least 4")
    return choosing, certifying


def _require_enough(certifying: int, quartered: bool, request: Request) -> None:
    first = calibration.spend(request.delta, 2)[0]
    needed = calibration.needed_prompts(request.risk, first, request.bound)
    if certifying < needed:
        total = -(-4 * needed // 3) if quartered else needed
        raise Refused(
            f"{certifying} different prompts certify{', a quarter of them chooses' if quartered else ''}; at least "
            f"{needed} must, so give {total} or more, to certify a risk of {request.risk} at delta {request.delta} "
            f"with the bound `{request.bound}` even if no prompt is harmed (the first of two attempts has delta "
            f"{first:g}); give more prompts, or raise the risk or delta"
        )


def _attempt(model, found: Survey, prompts: list[list[int]], request: Request) -> Certificate:
    """Returns the certificate of the first choice that passes; the second one is more careful than the first."""
    reference = None
    if request.harm not in BY_TOKEN:
        full = ExitPolicy.full(model.num_exits)
        reference = answer(model, prompts, full, request.max_new_tokens, request.batch_size)[0]
    by_risk, most, epsilon = request.budget is None, request.risk, request.risk if request.budget is None else 1.0
    rehearsed = None
    for delta in calibration.spend(request.delta, 2) if by_risk else [request.delta]:
        if by_risk and len(prompts) < calibration.needed_prompts(request.risk, delta, request.bound):
            break  # the second attempt's smaller delta needs more
        thresholds, promise = choose(model, found, request, len(prompts), delta, most, rehearsed)
        if by_risk and rehearsed is None and request.harm in BY_TOKEN and np.isfinite(thresholds).any():
            rehearsed = rehearse(model, found, request, thresholds)
            thresholds, promise = choose(model, found, request, len(prompts), delta, most, rehearsed)
        if by_risk and not np.isfinite(thresholds).any():
            logger.warning("no exit can be opened on %d prompts at a risk of %s: never leaving", len(prompts), epsilon)
        outcome = observe(model, prompts, ExitPolicy(thresholds), request.max_new_tokens, request.batch_size)
        harms = loss_per_prompt(request.harm, request.tolerance, outcome, reference)
        generator = np.random.default_rng(request.seed)
        passed, upper = calibration.certify(harms, epsilon, delta, request.bound, generator=generator)
        if passed:
            return _certificate(model, request, prompts, outcome, harms, thresholds, upper, promise)
        logger.warning("%s: bound %.4f on a mean harm of %.4f; retreating", thresholds, upper, harms.mean())
        most = promise["harm"] * RETREAT
    raise Refused(
        f"no policy was certified at `risk`={request.risk}, `delta`={request.delta}: the last bound was {upper:.4f} on "
        f"{len(harms)} prompts (mean harm {harms.mean():.4f}); raise the risk, give more prompts, or train longer"
    )


def _certificate(model, request: Request, prompts, outcome: Outcome, harms, thresholds, upper, promise) -> Certificate:
    # Tokens whose row has not left before: their K/V are the full model's own, computed by other arithmetic.
    left = (outcome.trace.taken < model.num_exits) & (np.arange(outcome.trace.taken.shape[1]) > 0)
    full = (outcome.trace.taken == model.num_exits) & ~np.logical_or.accumulate(left, axis=1)
    return Certificate(
        kind="budget" if request.budget is not None else "risk",
        epsilon=None if request.budget is not None else request.risk,
        delta=request.delta,
        n=len(harms),
        bound=request.bound,
        certified=float(upper),
        mean=float(harms.mean()),
        harm=request.harm if isinstance(request.harm, str) else getattr(request.harm, "__name__", "callable"),
        tolerance=request.tolerance if request.harm == "regret" else None,
        max_new_tokens=request.max_new_tokens,
        floor=float((outcome.regret[full] > 0).mean()) if full.any() else None,
        thresholds=list(thresholds),
        saved=1 - model.costs.price(outcome.trace).relative_flops,
        predicted=promise,
        seed=request.seed,
        data_digest=digest(repr(prompts).encode()),
        model_digest=model_digest(model),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    )


def load_tokenizer(model):
    """Returns the tokenizer that lies with the model's backbone."""
    from transformers import AutoTokenizer

    from adaptive.pretrained import resolve

    if not model.view.inner.name_or_path:
        raise ValueError("the backbone came without a name, so its tokenizer cannot be found; pass `tokenizer`")
    return AutoTokenizer.from_pretrained(resolve(str(model.view.inner.name_or_path)))
